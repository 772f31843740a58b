"""The six scripts as a user runs them: one process after the other, on the CPU."""

import json
import subprocess
import sys

import numpy as np
import torch
from conftest import ROOT, SIZES


def run(folder, script, *flags):
    """Run a script in folder, which must exit with 0; what it printed."""
    command = [sys.executable, str(ROOT / script), "--device", "cpu", *flags]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return done.stdout


def test_from_images_to_metrics(tmp_path, images):
    few = ["--steps", "3", "--batch-size", "8"]
    model = ["--image-size", "16", "--channels", "16", "--codebook-size", "24"]
    run(tmp_path, "tokenizer.py", "--data", str(images), *few, *model)
    run(tmp_path, "cluster.py", "--clusters", "4")
    run(tmp_path, "ar_model.py", *few, *SIZES)
    run(tmp_path, "aux_model.py", *few, *SIZES)
    run(tmp_path, "sample.py", "--num-samples", "12", "--export")
    assert "| CTF" in run(tmp_path, "evaluate.py", "--judge-steps", "3")
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
