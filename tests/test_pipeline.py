"""The six scripts as a user runs them, one after the other, in a folder of their own."""

import json
import runpy
import sys

import numpy as np
import torch
from conftest import ROOT, SIZES


def test_from_images_to_metrics(tmp_path, images, monkeypatch, capsys):
    monkeypatch.undo()  # figures
    monkeypatch.chdir(tmp_path)

    def run(script, *flags):
        monkeypatch.setattr(sys, "argv", [script, "--device", "cpu", *flags])
        runpy.run_path(str(ROOT / script), run_name="__main__")

    few = ["--steps", "3", "--batch-size", "8"]
    model = ["--image-size", "16", "--channels", "16", "--codebook-size", "24"]
    run("tokenizer.py", "--data", str(images), *few, *model)
    run("cluster.py", "--clusters", "4")
    run("ar_model.py", *few, *SIZES)
    run("aux_model.py", *few, *SIZES)
    run("sample.py", "--num-samples", "12", "--export")
    run("evaluate.py", "--judge-steps", "3")
    assert "| CTF" in capsys.readouterr().out
    out = tmp_path / "out"
    stems = ["tokenizer", "clusters", "coarse", "fine", "samples"]
    pictures = {f"{stem}.png" for stem in stems}
    artifacts = {f"{stem}.pt" for stem in (*stems, "images", "tokens", "classifier")}
    written = {path.name for path in out.iterdir()}  # no temporary file among them
    assert written == pictures | artifacts | {"metrics.json", "export"}
    assert all((out / name).stat().st_size > 5000 for name in pictures)
    for name in artifacts:
        torch.load(out / name, weights_only=True)
    assert len(np.load(out / "export" / "samples.npz")["arr_0"]) == 12
    rows = json.loads((out / "metrics.json").read_text("utf-8"))["rows"]
    (ctf,) = (row for row in rows if row.get("model") == "ctf")
    assert np.isfinite(ctf["fd"]) and ctf["bits_per_token"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "out"]
