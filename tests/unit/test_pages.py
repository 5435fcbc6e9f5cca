"""What a reader types of the manual, the site, README and the agents' skill works as it stands there.

Every command and every block in Python of these pages is run (page_reader), each page in a folder of its own.
What a page takes from its reader is in tests/data/pages. `my_train.py` is that of docs/guides/scientist.md,
plan files are those of docs/several-gpus.md, and a store holds a proof of concept made by hand. The Japanese
pages of docs have the commands of the English ones (test_docs.py); those of the site are run, too.
"""

from __future__ import annotations

import dataclasses
import pickle
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import build_site
import pytest
from allocator_snapshot import SnapshotWriter
from page_reader import GIVEN, ROOT, Reader, blocks, commands, file_name, with_stand_ins, write_files
from test_guides import made_by_hand

from memfit.jobs.registry import describe
from memfit.store import Store, default_path, exchange

PAGES = sorted(
    page
    for page in (
        ROOT / "README.md",
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("docs/site/en/**/*.md"),
        *ROOT.glob("skills/*/*.md"),
    )
    if not page.name.endswith(".ja.md") and page.name != "log.md"
)
JAPANESE = sorted(ROOT.glob("docs/site/ja/**/*.md"))  # those of docs are compared in test_docs.py
MINUTES = "takes minutes"
# Commands that are not run, each with the reason.
LEFT_OUT = {
    "bash scripts/poc.sh": "sets up an environment from the network",
    "bash scripts/check.sh": "sets up an environment from the network",
    "memfit estimate --on RTX-4090 -- python train.py config/train_gpt2.py": "needs nanoGPT and its data",
    "memfit run protein-lm --engine colossalai": "needs an environment of its own, which is downloaded",
    "memfit plan alphafold2 --from fold/openfold.args --on 8xH100-SXM": "needs the folder of the export",
    "python lessons/01_bet_on_the_peak.py": "run by test_lessons.py",
    "memfit plan protein-ss --corrected-by last": "needs a PoC of this machine; README's is made by hand",
    "python benchmarks/reproduce.py --quick": "writes pages of the repository",
    "python benchmarks/reproduce.py --all search": "writes pages of the repository",
    "python benchmarks/gpu/all.py --minutes 8": "needs a GPU",
    "python benchmarks/gpu/all.py --contribute card.jsonl": "needs what a GPU has measured",
    "memfit record --add job": "needs what Slurm has run: tests/cpu/test_slurm.py does it",
    "pip install 'memfit[cluster]'": "needs the network",
    "pip install memfit-0.2.0-py3-none-any.whl": "needs the network",
}
LEFT_OUT |= {f"memfit poc {job.name} --seeds 1": "takes minutes; the job is estimated" for job in describe()}
# Commands of which the first seconds are run.
BEGUN = {
    "memfit plan protein-ss --measure": MINUTES,
    "memfit plan --from axolotl.yml --on RTX-4090": MINUTES,
    "memfit plan hf:meta-llama/Llama-3.1-8B --length 8192 --batch 16 --on 8xH100-SXM": MINUTES,
    "memfit plan hf:llama-3.1-8b --on 8xH100-SXM --length 8192 --batch 8 --json": MINUTES,
    "memfit export alphafold2 --size finetune --batch 8 --plan fold.yaml --to openfold --out fold": MINUTES,
    "memfit run alphafold2 --plan chunked.yaml": MINUTES,
    "memfit poc --memory 512MiB --seeds 5": MINUTES,
    "memfit poc protein-lm --on this:cpu": MINUTES,
    "memfit poc protein-ss": MINUTES,
    "memfit poc --nproc 2": MINUTES,
    "memfit poc my_train.py:job --executor local:parallel=4 --budget 2h": MINUTES,
    "memfit poc my_train.py:job --accuracy exact --memory 94MiB --seeds 1": MINUTES,
    "memfit plan alphafold2 --size initial --on A100-80GB": MINUTES,
    "memfit plan hf:meta-llama/Llama-3.1-70B --length 8192 --batch 1024 --on 64x8xH100-SXM@IB-NDR": MINUTES,
}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def typed(text: str) -> Iterator[str]:
    """Yield every command of a page's blocks."""
    for language, body, _ in blocks(text):
        yield from (command for command, _, _ in commands(language, body))


WITH_CODE = [page for page in (*PAGES, *JAPANESE) if [*typed(text_of(page))] or "```python" in text_of(page)]


def shorter(command: str) -> str:
    """A search gets five seconds, unless the page says how long it takes, and a training a few steps. ID is
    that of the proof of concept in the store. On a GPU of the catalog no operator is timed."""
    command = command.replace(" ID ", f" {made_by_hand().poc_id} ")
    if re.match(r"memfit (plan|estimate .*--plans) ", command) and "--within" not in command:
        return re.sub(r"^memfit (plan|estimate)", r"memfit \1 --within 5s", command)
    if re.fullmatch(r"memfit estimate \S+( --plan plan.yaml)?", command):  # of each job and technique
        return f"{command} --on 2xH100-SXM"
    if re.match(r"memfit (run|sweep) ", command):
        command = re.sub(r" --(steps|save-every) \d+", "", command)
        every = " --save-every 2" if "--save " in command else ""
        return f"{command} --steps {8 if '--resume' in command else 4}{every}"
    return command


def write_given(folder: Path) -> None:
    """Writes what a page takes from its reader and from other pages."""
    shutil.copytree(GIVEN, folder, dirs_exist_ok=True)
    for page in ("several-gpus", "science-jobs", "guides/scientist"):
        for language, body, _ in blocks(text_of(ROOT / f"docs/{page}.md")):
            if (name := file_name(language, body)) and name != "trainer.yaml":
                (folder / name).write_text(body, encoding="utf-8")
    fsdp = (folder / "fsdp.yaml").read_text(encoding="utf-8")
    zero = re.sub(r"fsdp2: .*", "zero: {stage: 2}", fsdp)
    for name, plan in (("zero", zero), ("fsdp2x2", fsdp), ("zero2x2", zero)):
        ranks = re.sub("ranks: 8", "ranks: 2", plan) if name.endswith("x2") else plan
        (folder / f"{name}.yaml").write_text(ranks, encoding="utf-8")
    front_ends, deaths = ROOT / "tests/data/front_ends", ROOT / "tests/data/deaths"
    for theirs, ours in (
        (front_ends / "axolotl-qlora.yml", "axolotl.yml"),
        (front_ends / "lightning-ddp.yaml", "lightning.yaml"),
        (front_ends / "mace-distributed.sh", "run_mace.sh"),
        (front_ends / "mace-config.yml", "mace-config.yml"),
        (deaths / "fragmentation_after_hours_3.txt", "train.log"),
    ):
        shutil.copy(theirs, folder / ours)
    device = SnapshotWriter(100 * 2**20)
    for _ in range(5):
        device.allocate(30 * 2**20)
    (folder / "benchmarks").symlink_to(ROOT / "benchmarks")
    (folder / "oom.pickle").write_bytes(pickle.dumps(device.snapshot()))


def follower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Reader:
    """A reader with what pages take from their readers, and with a proof of concept in the store."""
    folder = tmp_path / "reader"
    write_given(folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("MEMFIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "125")
    monkeypatch.setenv("PATH", with_stand_ins(tmp_path / "stand-ins"))
    by_hand = made_by_hand()
    theirs = dataclasses.replace(by_hand, poc_id="2026-03-02-7d20")
    Path("theirs.json").write_text(exchange.text(exchange.of_poc(theirs)), encoding="utf-8")
    for kind in ("begin", "poc"):
        Store(default_path()).append(by_hand.poc_id, kind, by_hand)
    return Reader(capsys, left_out=LEFT_OUT, begun=BEGUN, shorter=shorter)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="the user's data folder is moved as Linux has it")
@pytest.mark.skipif(shutil.which("patch") is None, reason="needs the program patch")
@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_what_a_reader_types_of_a_page_works_as_it_stands_there(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader = follower(tmp_path, monkeypatch, capsys)
    for name in re.findall(r"(?:--save|--out|>) (\S+\.\w+)", " ".join(typed(text_of(page)))):
        Path(name).unlink(missing_ok=True)  # the page writes it
    if page.name == "README.md":  # which shows what is wrong with the guide's
        write_files(text_of(ROOT / "docs/guides/scientist.md"))
    reader.follow(name_of(page), text_of(page))


@pytest.fixture(scope="module")
def generated() -> build_site.Pages:
    writer = build_site.Writer("en")
    for part in (writer.techniques, writer.engines, writer.rules, writer.jobs):
        part()
    return writer.pages


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("folder", ["techniques", "engines", "jobs", "lint"])
def test_the_commands_of_a_generated_page_work(
    folder: str,
    generated: build_site.Pages,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reader = follower(tmp_path, monkeypatch, capsys)
    for page, text in generated.items():
        if page.startswith(f"{folder}/"):
            reader.follow(page, text)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", [p for p in PAGES if "skills" in p.parts], ids=name_of)
def test_the_commands_that_a_skill_tells_an_agent_work(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader = follower(tmp_path, monkeypatch, capsys)
    Path("plan.yaml").unlink()
    text = text_of(page).replace(" JOB ", " my_train.py:job ").replace(" RULE`", " trainer-two-precisions`")
    assert reader.run_those_in_sentences(name_of(page), text) > 6


def test_every_command_that_is_left_out_is_still_in_a_page(generated: build_site.Pages) -> None:
    everything = {command for text in (*map(text_of, PAGES), *generated.values()) for command in typed(text)}
    in_sentences = {c for page in PAGES for c in re.findall(r"`(memfit [^`]+)`", text_of(page))}
    assert {*LEFT_OUT, *BEGUN} - everything - in_sentences == set()
    assert LEFT_OUT.keys().isdisjoint(BEGUN)


@pytest.mark.parametrize("page", JAPANESE, ids=name_of)
def test_a_japanese_page_of_the_site_has_the_commands_of_the_english_one(page: Path) -> None:
    english = ROOT / "docs/site/en" / page.relative_to(ROOT / "docs/site/ja")
    theirs, ours = ([re.sub(" --lang (en|ja)", "", c) for c in typed(text_of(p))] for p in (english, page))
    assert ours == theirs
