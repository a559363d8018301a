"""The pictures of demo/compare.py and demo/trace.py show what the runs gave."""
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import emag as emag_module  # noqa: E402
import sampler  # noqa: E402
from dit import load_dit  # noqa: E402
from test_emag import files, script  # noqa: E402, F401


def test_compare_draws_what_each_guidance_draws_alone(files, tmp_path, monkeypatch):
    compare, drawn, path = script("demo/compare.py"), {}, tmp_path / "compare.png"
    page = Image.new("RGB", (9, 9))
    monkeypatch.setattr(compare, "draw_grid", lambda table, labels: drawn.update(zip(labels, table)) or page)
    flags = ["--ckpt", files / "flow.pt", "--num", 3, "--batch", 2, "--apg", 0.5, 4, -0.25, "--emag", 3]
    assert compare.main([str(arg) for arg in [*flags, "--out", path]]) == 0
    settings, (model, meta) = json.loads(Image.open(path).text["settings"]), load_dit(files / "flow.pt")
    lines = settings.pop("lines")
    for (title, images), (label, line), (name, changes) in zip(drawn.items(), lines.items(), {
            "no guidance": dict(cfg=1.0, emag=1.0), "CFG": dict(emag=1.0), "EMAG": {},
            "EMAG + APG": dict(apg=[0.5, 4, -0.25]), "EMAG + CADS": dict(cads=settings["cads"])}.items(), strict=True):
        assert title.startswith(label) and label.split("\n")[0] == name
        assert line == settings | dict(apg=None, cads=None) | changes
        expected = sampler.to_images(sampler.sample(model, meta, [2, 0, 2], range(3), sampler.Settings(**line)))
        assert np.abs(np.stack(images).astype(int) - expected).max() <= 1
    assert len({np.stack(images).tobytes() for images in drawn.values()}) == 5
    (negative,) = compare.lines_of(sampler.Settings(**settings), ["negative"]).values()
    assert (negative.emag, negative.cfg, negative.apg, negative.cads) == (0, settings["cfg"], None, None)


@pytest.mark.parametrize("flags", [[], ["--variant", "query", "--threshold", "0"], ["--layers", "2", "--steps", "1"]])
def test_trace_draws_what_happened(flags, files, tmp_path, monkeypatch):
    """What it keeps are the predictions and the maps of the run, and the picture has the run's settings."""
    trace, traces, told, maps, path = script("demo/trace.py"), [], [], [], tmp_path / "trace.png"
    draw_page = trace.draw
    monkeypatch.setattr(trace, "draw", lambda kept, *rest: traces.append(kept) or draw_page(kept, *rest))
    argv = ["--ckpt", str(files / "flow.pt"), "--num", "4", "--steps", "5", *flags, "--out", str(path)]
    assert trace.main(argv) == 0
    settings, (kept,) = sampler.Settings(**json.loads(Image.open(path).text["settings"])), traces
    update = emag_module.ema_update
    monkeypatch.setattr(emag_module, "ema_update", lambda ema, attn, beta: maps.append(attn) or update(ema, attn, beta))
    model, meta = load_dit(files / "flow.pt")
    sampler.sample(model, meta, [2, 0, 2, 0], range(4), settings, told.append)
    told = [step for step in told if step.negative is not None]
    for (step, size), other in zip(kept.perturbed, told, strict=True):
        assert step.step == other.step and torch.equal(step.negative, other.negative[:1])
        torch.testing.assert_close(size, (other.clean - other.negative).flatten(1).norm(dim=1))
    layers = len(settings.layers)
    for i, (attn, _) in enumerate(kept.rows.values()):                      # of the first sample, a token in the middle
        expected = torch.stack([each[0, :, kept.token].mean(dim=0) for each in maps[i * layers:(i + 1) * layers]])
        torch.testing.assert_close(attn, expected, rtol=1e-3, atol=1e-5)
    assert len(kept.rows) == (0 if settings.variant == "query" else len(kept.emag.trace))
