"""The six scripts as a user runs them: processes, one after the other, on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from tests.conftest import SIZES

ROOT = Path(__file__).parent.parent


def run(folder, script, *flags):
    """Run a script in folder, which must exit with 0."""
    command = [sys.executable, str(ROOT / script), "--device", "cpu", *flags]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_from_images_to_metrics(tmp_path, images):
    few = ["--steps", "3", "--batch-size", "8"]
    model = ["--image-size", "16", "--channels", "16", "--codebook-size", "24"]
    run(
        tmp_path,
        "tokenizer.py",
        "--data",
        str(images),
        "--codebook-after",
        "1",
        *few,
        *model,
    )
    run(tmp_path, "cluster.py", "--clusters", "4")
    run(tmp_path, "ar_model.py", *few, *SIZES)
    run(tmp_path, "aux_model.py", *few, *SIZES)
    run(tmp_path, "sample.py", "--num-samples", "12", "--npz", "--anatomy")
    done = run(tmp_path, "evaluate.py", "--judge-steps", "3")
    assert "CTF samples" in done.stdout

    out = tmp_path / "out"
    for name in ("tokenizer", "clusters", "coarse", "samples", "metrics", "anatomy"):
        assert (out / f"{name}.png").stat().st_size > 5000
    stems = ["tokenizer", "clusters", "coarse", "fine", "samples", "metrics"]
    written = {f"{stem}.png" for stem in stems} | {f"{stem}.pt" for stem in stems[:-1]}
    written |= {
        "anatomy.png",
        "tokens.pt",
        "classifier.pt",
        "metrics.json",
        "samples.npz",
        "samples",
    }
    assert {path.name for path in out.iterdir()} == written  # and no temporary file
    for path in out.glob("*.pt"):
        torch.load(path, weights_only=True)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["rows"][0]["model"] == "ctf" and np.isfinite(
        metrics["rows"][0]["fd"]
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "out"]
