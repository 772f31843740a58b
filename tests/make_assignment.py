"""Write a copy of this repository for students, with chosen functions to fill in.

    python tests/make_assignment.py --list
    python tests/make_assignment.py ../homework --exercise guidance key-value-cache
    python tests/make_assignment.py ../homework        # all exercises at once
    python tests/make_assignment.py --check            # that tests pinpoint each of them

An exercise keeps its signature and docstring, and raises NotImplementedError with a
sentence on what to do. The tests that the table names then fail, and those of the other
stages pass, but for those that it says cannot do without it. The copies are made from
the code itself: there is no second version of it.
"""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
STAGES = ["tokenizer", "cluster", "ar_model", "aux_model", "sample", "evaluate"]


@dataclass
class Exercise:
    stage: str  # which file, without .py
    function: str  # in that file: "name", or "Class.name"
    reference: str  # where the method is from: paper, figure, equation
    task: str  # one sentence, which NotImplementedError says
    tests: list  # in tests/test_<stage>.py: what checks it, and fails without it
    needed_by: tuple = ()  # later stages whose tests cannot do without it


EXERCISES = {
    "straight-through": Exercise(
        "tokenizer",
        "VQVAE.quantize",
        "VQ-VAE (van den Oord et al. 2017), equations 1 to 3",
        "Find the nearest codeword of every vector, let the gradient pass straight "
        "through, and measure the commitment loss.",
        [
            "test_quantize_picks_the_nearest_code",
            "test_quantize_hands_the_gradient_straight_through",
            "test_commitment_pulls_the_encoder_and_not_the_codes",
        ],
    ),
    "codebook-update": Exercise(
        "tokenizer",
        "VQVAE.update_codebook",
        "VQ-VAE, appendix A.1",
        "Move every code to the moving average of the vectors that chose it, make it a "
        "unit vector again, and restart dead codes.",
        [
            "test_the_codebook_follows_moving_averages",
            "test_dead_codes_start_anew_at_an_encoder_output",
        ],
    ),
    "seeding": Exercise(
        "cluster",
        "kmeans_plus_plus",
        "k-means++ (Arthur and Vassilvitskii 2007)",
        "Draw k rows, each with a probability proportional to its squared distance to "
        "the nearest row drawn before.",
        [
            "test_seeding_draws_in_proportion_to_the_squared_distance",
            "test_seeding_takes_every_distinct_row_before_any_twice",
        ],
    ),
    "k-means": Exercise(
        "cluster",
        "kmeans",
        "CTF, figure 1a; Lloyd's algorithm",
        "Assign every row to its nearest centroid, move the centroids to the means, and "
        "repeat until no label changes; no cluster may stay empty.",
        [
            "test_kmeans_against_scipy",
            "test_kmeans_ends_at_a_fixed_point",
            "test_inertia_never_rises_and_no_cluster_stays_empty",
        ],
    ),
    "swap": Exercise(
        "cluster",
        "swap_within_clusters",
        "CTF, figure 1b",
        "Replace every token by a code drawn at random from the cluster of that token.",
        ["test_swaps_stay_in_their_cluster_and_reach_all_of_it"],
    ),
    "causal-attention": Exercise(
        "ar_model",
        "Block.forward",
        "LlamaGen's block: RMSNorm, SwiGLU; the causal mask",
        "Attend, with a causal mask if self.causal, add that to x, and add what the "
        "gated feed-forward network makes of it.",
        [
            "test_future_tokens_do_not_change_past_logits",
            "test_attention_against_the_formula",
        ],
        needed_by=("aux_model",),
    ),
    "key-value-cache": Exercise(
        "ar_model",
        "Cache.extend",
        "none: it changes the speed, and no result",
        "Append the new keys and values to those kept, and return all of them.",
        [
            "test_cached_logits_equal_those_of_the_whole_pass",
            "test_generate_equals_generation_without_a_cache",
        ],
    ),
    "coarse-loss": Exercise(
        "ar_model",
        "next_token_loss",
        "CTF, figure 1c: p(c_t given c_<t, y)",
        "Predict every token from the class and the tokens before it, and return the "
        "mean cross-entropy.",
        ["test_loss_is_the_mean_of_minus_log_p"],
    ),
    "guidance": Exercise(
        "ar_model",
        "guide",
        "classifier-free guidance (Ho and Salimans 2022)",
        "Go from the logits without the class towards those with it, and beyond: scale "
        "times the whole way.",
        ["test_guidance_formula"],
    ),
    "top-k-top-p": Exercise(
        "ar_model",
        "filter_logits",
        "CTF, table 3 (d); top-p: Holtzman et al. 2020",
        "Set all logits to -inf but the top_k largest, and then all but the fewest "
        "largest that reach the probability top_p.",
        ["test_top_k_keeps_the_k_largest", "test_top_p_keeps_the_fewest_that_reach_p"],
    ),
    "masked-head": Exercise(
        "aux_model",
        "AuxModel.cluster_logits",
        "CTF, figure 1c: q_i lies in the cluster c_i",
        "Give every token the logits of the codes of its own cluster, in the order of "
        "self.members; computing all K and picking will do.",
        ["test_logits_are_those_of_the_masked_k_way_head"],
    ),
    "fine-loss": Exercise(
        "aux_model",
        "fine_loss",
        "CTF, figure 1c: p(q_i given c_1 .. c_T, y)",
        "Return the mean cross-entropy of the fine labels within their clusters, and "
        "how often the likeliest one is right.",
        [
            "test_loss_is_the_masked_cross_entropy",
            "test_gradient_is_that_of_the_masked_cross_entropy",
        ],
    ),
    "one-pass": Exercise(
        "aux_model",
        "predict_fine",
        "CTF, figure 1c: the + 1 of T + 1 steps",
        "Draw all fine labels from one pass: guide, mask to the cluster, divide by the "
        "temperature, keep the top_k.",
        [
            "test_a_fine_label_always_lies_in_its_cluster",
            "test_likeliest_fine_labels_with_guidance",
        ],
    ),
    "sampling": Exercise(
        "sample",
        "sample_images",
        "CTF, figure 1c",
        "Draw the coarse labels, then the fine labels, and decode them; the baseline "
        "draws fine labels at once.",
        [
            "test_coarse_then_fine_then_pixels",
            "test_the_baseline_draws_fine_labels_directly",
        ],
    ),
    "frechet-distance": Exercise(
        "evaluate",
        "frechet_distance",
        "FID (Heusel et al. 2017), equation 6",
        "Compute the squared distance of the means plus the trace of "
        "S1 + S2 - 2 (S1 S2)^1/2.",
        [
            "test_frechet_distance_against_the_matrix_root",
            "test_frechet_distance_of_independent_features_in_closed_form",
            "test_frechet_distance_of_singular_covariances",
        ],
    ),
    "precision-recall": Exercise(
        "evaluate",
        "precision_recall",
        "Kynkäänniemi et al. 2019, equations 1 and 2",
        "Find which points lie within the k-th neighbour distance of a member of the "
        "other set, both ways.",
        ["test_precision_recall_against_loops"],
    ),
}


def find(source, exercise):
    """The ast node of the function of an exercise in the source of its file."""
    body = ast.parse(source).body
    for name in exercise.function.split("."):
        node = next(item for item in body if getattr(item, "name", None) == name)
        body = node.body
    return node


def blank(source, exercise):
    """source, with the body of one function replaced by NotImplementedError(task)."""
    node, lines = find(source, exercise), source.splitlines(keepends=True)
    first, last = node.body[1], node.body[-1]  # body[0] is the docstring
    indent = " " * first.col_offset
    # The sentence as string literals of one line each, which Python joins.
    words = textwrap.wrap(exercise.task, 70, drop_whitespace=False)
    said = [f"{indent}    {part!r}\n" for part in words]
    text = [f"{indent}raise NotImplementedError(\n", *said, f"{indent})\n"]
    end = node.body[0].end_lineno
    return "".join([*lines[:end], *text, *lines[last.end_lineno :]])


def count_lines(source, exercise):
    """Lines of the solution, without docstring, comments and empty ones."""
    body = find(source, exercise).body[1:]
    lines = source.splitlines()[body[0].lineno - 1 : body[-1].end_lineno]
    return sum(bool(line.strip()) and line.strip()[0] != "#" for line in lines)


def table():
    """All exercises as the Markdown table of the README."""
    rows = ["| exercise | function | lines | source | tests that check it |"]
    rows += ["|---|---|---|---|---|"]
    for name, e in EXERCISES.items():
        lines = count_lines((ROOT / f"{e.stage}.py").read_text("utf-8"), e)
        tests = ", ".join(f"`{test}`" for test in e.tests)
        needed = "".join(f"; {stage}.py needs it as well" for stage in e.needed_by)
        function = f"`{e.stage}.py`: `{e.function}`"
        rows.append(
            f"| {name} | {function} | {lines} | {e.reference} | {tests}{needed} |"
        )
    return "\n".join(rows)


def write_assignment(folder, names):
    """Copy the repository to folder, which is not there yet, with exercises blanked."""
    shutil.copytree(
        ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__")
    )
    for own in ("make_assignment.py", "test_make_assignment.py"):
        (folder / "tests" / own).unlink()
    for name in ("requirements.txt", ".gitignore"):
        shutil.copy(ROOT / name, folder / name)
    readme = (ROOT / "README.md").read_text("utf-8")
    # Without the section on this script, up to the next heading.
    readme = re.sub(r"## For a course\n.*?(?=\n## )\n", "", readme, flags=re.DOTALL)
    (folder / "README.md").write_text(readme, "utf-8")
    shutil.copytree(ROOT / ".github", folder / ".github")
    for stage in STAGES:
        source = (ROOT / f"{stage}.py").read_text("utf-8")
        for exercise in (EXERCISES[name] for name in names):
            if exercise.stage == stage:
                source = blank(source, exercise)
        (folder / f"{stage}.py").write_text(source, "utf-8")


def run_tests(folder, stages):
    """{(stage, test): message} of what fails in the test files of some stages."""
    files = [f"tests/test_{stage}.py" for stage in stages]
    command = [sys.executable, "-m", "pytest", "-q", "--junitxml=report.xml", *files]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, check=False
    )
    failures = {}
    for case in ElementTree.parse(folder / "report.xml").iter("testcase"):
        problem = [e for e in case if e.tag in ("failure", "error")]
        if problem:
            stage = case.get("classname").removeprefix("tests.test_")
            failures[stage, case.get("name").split("[")[0]] = problem[0].get("message")
    return failures


def check(name):
    """Whether the tests pinpoint one exercise: (name, what is wrong, in lines)."""
    exercise = EXERCISES[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "copy")
        write_assignment(folder, [name])
        # No stage imports a later one.
        stages = STAGES[STAGES.index(exercise.stage) :]
        failures = run_tests(folder, stages)
    wrong = []
    for test in exercise.tests:
        message = failures.get((exercise.stage, test), "")
        if exercise.task[:40] not in message:
            wrong.append(f"{test} should fail and say what to do: {message!r}")
    allowed = (exercise.stage, *exercise.needed_by)
    wrong += [f"{s}: {t} fails as well" for s, t in failures if s not in allowed]
    return name, wrong


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("folder", type=Path, nargs="?", help="where to write the copy: a new folder")
    add("--exercise", nargs="+", choices=EXERCISES, default=list(EXERCISES))
    add("--list", action="store_true", help="print the table of exercises")
    add("--check", action="store_true", help="blank each in turn, and run the tests")
    args = parser.parse_args(argv)
    if args.list:
        print(table())
    elif args.check:
        failed = False
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for name, wrong in pool.map(check, args.exercise):
                print(f"{name}: {'pinpointed' if not wrong else 'NOT pinpointed'}")
                print("".join(f"    {line}\n" for line in wrong), end="", flush=True)
                failed = failed or bool(wrong)
        raise SystemExit(failed)
    elif args.folder is None:
        parser.error("which folder is the copy to be written to?")
    elif args.folder.exists():
        parser.error(f"{args.folder} is there already")
    else:
        write_assignment(args.folder, args.exercise)
        print(f"wrote {args.folder}: {', '.join(args.exercise)}")


if __name__ == "__main__":
    main()
