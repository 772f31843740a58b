"""The tables over several folders, and the script that makes them."""

import json
import subprocess

import pytest
import results
import torch
from conftest import ROOT, edit

import evaluate
import sample


def judged(folder, fd, bits=(2.0, 3.0), **protocol):
    """A folder with a metrics.json of two rows."""
    row = {"name": "real training images", "fd": 0.5, "inception_score": 9.0}
    row |= {"class_accuracy": 1.0, "precision": 0.9, "recall": 0.8}
    model = {"name": "CTF", "model": "ctf", "fd": fd, "bits_per_stage": bits}
    model |= {"train_seconds": 10 * fd, "steps": [4, 2]}
    facts = {"data": "pets", "num_samples": 16, "num_real": 24, "steps": 800}
    facts |= {"images_id": "x", "clusters": "kmeans"} | protocol
    folder.mkdir()
    text = json.dumps({"protocol": facts, "rows": [row, row | model]})
    (folder / "metrics.json").write_text(text)
    return folder


def test_mean_and_sample_deviation_of_seeds(tmp_path):
    pairs = zip("abc", (1, 2, 6), ((1.0, 2.0), (2.0, 3.0), (3.0, 4.0)))
    text = results.mean([judged(tmp_path / name, fd, bits) for name, fd, bits in pairs])
    # Of 1, 2, 6: the squared distances from 3 are 4, 1 and 9, over n - 1 = 2.
    assert "| CTF | 3.00 ± 2.65 | 9.00 ± 0.00 | 100.0 ± 0.0% |" in text
    assert "| 2.00 + 3.00 | 30 |" in text and text.endswith("24 test images of pets")


@pytest.mark.parametrize("name", ["num_samples", "images_id", "clusters", "steps"])
def test_folders_that_were_judged_differently_are_not_averaged(tmp_path, name):
    folders = [judged(tmp_path / "a", 1), judged(tmp_path / "b", 1, **{name: "other"})]
    with pytest.raises(SystemExit, match="differ"):
        results.mean(folders)


def test_the_best_settings_have_the_lowest_distance(trained):
    flags = ["--num-samples", "24", "--seed", "1"]
    search = trained / "search"
    search.mkdir()
    sample.main(["--out", str(search), *flags, "--cfg-scales", "1", "4"])
    sample.main(["--out", str(trained), *flags])
    evaluate.main(["--out", str(trained), "--judge-steps", "2"])
    lines = results.best([search]).splitlines()[2:]
    distances = [float(line.split("|")[2]) for line in lines]
    assert len(lines) == 2 and distances == sorted(distances)
    # Files of the same settings are all listed.
    assert len(results.best([search, search]).splitlines()) == 2 + 4
    # It is the distance that evaluate.py measures.
    evaluate.main(["--out", str(search / "cfg1"), "--judge-steps", "2"])
    rows = json.loads((search / "cfg1" / "metrics.json").read_text())["rows"]
    assert f"| {rows[-1]['fd']:.2f} |" in next(x for x in lines if "guidance 1 " in x)


def test_refined_samples_keep_their_coarse_labels(trained, monkeypatch):
    sample.main(["--out", str(trained), "--num-samples", "24", "--model", "baseline"])
    samples = torch.load(trained / "samples-baseline.pt", weights_only=True)
    decoded = []
    capture = lambda vqvae, fine: decoded.append(fine)
    monkeypatch.setattr(results.tokenizer, "reconstruct", capture)
    monkeypatch.setattr(results, "scores", lambda *_: dict.fromkeys(results.SCORES, 1))
    text = results.refine([trained])
    g = torch.load(trained / "clusters.pt", weights_only=True)["code_to_cluster"]
    coarse = g[samples["fine"]]
    assert len(decoded) == 2 and all(torch.equal(g[fine], coarse) for fine in decoded)
    # The first takes the argmax, the second samples.
    aux = sample.load_models(trained, "ctf", torch.device("cpu"))[0]["aux"]
    index = aux(coarse, samples["classes"]).argmax(dim=-1)[..., None]
    assert torch.equal(decoded[0], aux.members[coarse].gather(2, index)[..., 0])
    assert not torch.equal(*decoded) and len(text.splitlines()) == 5


def test_coarse_bits_of_the_baseline_against_a_loop(trained):
    """Without learnt weights the baseline is uniform over K codes, and its clusters are
    of equal size: log2 of M = 4 bits."""
    artifact = torch.load(trained / "baseline.pt", weights_only=True)
    artifact["model"]["head.weight"].zero_()
    edit(trained / "baseline.pt", model=artifact["model"])
    line = results.coarse([trained]).splitlines()[-1]
    assert line.split("|")[3].strip() == "2.000"


def test_a_finished_command_is_skipped_and_a_stopped_one_is_resumed(tmp_path):
    script = (ROOT / "tests" / "reproduce.sh").read_text()
    script = script.replace('"$0")/..', '"$0")')
    tool = "echo called $* >> log; test -e ready || { touch ready; exit 1; }"
    (tmp_path / "ar_model.py").write_text(tool)
    (tmp_path / "run.sh").write_text(script + "once bash ar_model.py --lr 1\n")
    command = ["bash", str(tmp_path / "run.sh")]
    codes = [subprocess.run(command, check=False).returncode for _ in range(3)]
    assert codes == [1, 0, 0]
    assert (tmp_path / "log").read_text() == "called --lr 1\ncalled --lr 1 --resume\n"
