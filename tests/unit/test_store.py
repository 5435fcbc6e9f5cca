"""The store: rows are only added and survive a kill, and any other file is refused in one line."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfit.runtime import devices
from memfit.store import Store, database, default_path, digest, fingerprint
from memfit.store import environment as environment_module
from memfit.types.errors import UserError
from memfit.types.plan import Plan, use


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "data" / "memfit.sqlite3")


def test_appended_records_are_read_back_in_order(store: Store) -> None:
    first = store.append("poc-a", "run", {"x": 0.1})
    second = store.append("poc-b", "run", [1, 2])
    third = store.append("poc-a", "verdict", Plan(uses=(use("bf16-autocast"),)))
    assert Store(store.path).records() == (first, second, third)
    assert store.records("poc-a") == (first, third)
    assert store.records(kind="run") == (first, second)
    assert store.records("poc-a", "verdict") == (third,)
    assert json.loads(third.body) == {"uses": [{"technique": "bf16-autocast", "knobs": []}], "ranks": 1}
    assert first.created <= second.created <= third.created


def test_poc_ids_are_oldest_first_and_the_latest_is_the_one_begun_last(store: Store) -> None:
    assert (store.poc_ids(), store.latest_poc_id()) == ((), None)
    store.append("run", "run", {})  # of `memfit run`
    for poc_id in ("b", "a", "b"):
        store.append(poc_id, "begin", {})
    assert (store.poc_ids(), store.latest_poc_id()) == (("b", "a"), "a")


def test_a_record_refers_to_its_full_environment(store: Store) -> None:
    record = store.append("poc", "run", {})
    assert store.environment(record.environment) == fingerprint()
    with pytest.raises(UserError, match="no recorded environment"):
        store.environment("0" * 16)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE record SET body = 'better'",
        "DELETE FROM record",
        "INSERT OR REPLACE INTO record SELECT record_id, poc_id, kind, created, environment, 'x' FROM record",
        "UPDATE environment SET body = '{}'",
        "DELETE FROM environment",
        "INSERT OR REPLACE INTO environment SELECT digest, '{}' FROM environment",
    ],
)
def test_the_database_refuses_updates_deletions_and_replacements(store: Store, statement: str) -> None:
    record = store.append("poc", "run", {"x": 1})
    with contextlib.closing(sqlite3.connect(store.path)) as raw:
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            raw.execute(statement)
        raw.commit()
    assert store.records() == (record,)


APPENDER = """
import sys
from pathlib import Path
from memfit.store import Store
store = Store(Path(sys.argv[1]))
for i in range(100_000):
    store.append("poc", "row", {"i": i, "filling": "x" * 5_000})
    print(i, flush=True)
"""


@pytest.mark.parametrize("seen", [0, 7, 20])
def test_a_killed_writer_leaves_a_complete_prefix_of_its_records(tmp_path: Path, seen: int) -> None:
    path = tmp_path / "memfit.sqlite3"
    with subprocess.Popen([sys.executable, "-c", APPENDER, str(path)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        for _ in range(seen + 1):
            child.stdout.readline()
        child.send_signal(signal.SIGKILL)
        acknowledged = seen + 1 + len(child.stdout.read().splitlines())
    numbers = [json.loads(r.body)["i"] for r in Store(path).records("poc")]
    assert numbers == list(range(len(numbers)))
    assert acknowledged <= len(numbers) <= acknowledged + 1
    Store(path).append("next", "row", {})


def test_concurrent_writers_lose_no_records(tmp_path: Path) -> None:
    path = tmp_path / "memfit.sqlite3"

    def write(name: str) -> None:
        for i in range(10):
            Store(path).append(name, "row", {"i": i})

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(write, "abcd"))
    for name in "abcd":
        assert [json.loads(r.body)["i"] for r in Store(path).records(name)] == list(range(10))


def test_a_store_that_another_writer_creates_meanwhile_is_no_foreign_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "memfit.sqlite3"
    original, writers = database._pragma, list[threading.Thread]()

    def pragma(connection: sqlite3.Connection, name: str) -> int:
        value = original(connection, name)
        if not writers:  # between two looks at the empty file
            writers.append(threading.Thread(target=lambda: Store(path).append("other", "row", {})))
            writers[0].start()
            writers[0].join(timeout=0.5)
        return value

    monkeypatch.setattr(database, "_pragma", pragma)
    Store(path).append("poc", "row", {})
    writers[0].join()
    assert {r.poc_id for r in Store(path).records()} == {"other", "poc"}


def test_initialising_an_existing_store_again_changes_nothing(store: Store) -> None:
    record = store.append("poc", "run", {})
    with store._connection() as connection:
        store._create_tables(connection)
    assert store.records() == (record,)


# --- files that are no store


def test_a_text_file_is_refused_and_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("my notes " * 100)
    with pytest.raises(UserError, match=r"cannot be used: file is not a database; choose another"):
        Store(path)
    assert path.read_text() == "my notes " * 100


def test_another_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    with contextlib.closing(sqlite3.connect(path)) as raw:
        raw.execute("CREATE TABLE mine (x)")
    with pytest.raises(UserError, match="not a memfit store"):
        Store(path)


def test_a_store_of_a_later_version_is_refused(store: Store) -> None:
    with contextlib.closing(sqlite3.connect(store.path)) as raw:
        raw.execute("PRAGMA user_version = 99")
    with pytest.raises(UserError, match="schema version 99; allowed: version 1"):
        Store(store.path)


def test_an_empty_file_becomes_a_store(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert Store(tmp_path / "empty").records() == ()


def test_a_folder_or_file_in_place_of_the_store_is_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "memfit.sqlite3"):
        with pytest.raises(UserError) as caught:
            Store(path)
        assert "\n" not in str(caught.value)


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """A folder whose parents the user nobody may enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder
        folder.chmod(0o755)


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Acts as the user nobody, because root may write anywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_in_a_read_only_folder_an_existing_store_can_only_be_read(shared_folder: Path) -> None:
    store = Store(shared_folder / "memfit.sqlite3")
    record = store.append("poc", "run", {})
    store.path.chmod(0o444)
    shared_folder.chmod(0o555)
    with as_nobody():
        for new in (shared_folder / "new.sqlite3", shared_folder / "sub" / "new.sqlite3"):
            with pytest.raises(UserError, match="choose another file with --store"):
                Store(new)
        readable = Store(store.path)
        assert readable.records() == (record,)
        with pytest.raises(UserError, match="readonly"):
            readable.append("poc", "run", {})


def test_the_default_store_is_in_the_users_data_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    if sys.platform == "linux":
        assert default_path() == tmp_path / "memfit" / "memfit.sqlite3"
        assert Store().path.exists()
    assert default_path().name == "memfit.sqlite3"


# --- environment


def test_the_environment_fingerprint_does_not_load_torch() -> None:
    code = "import sys; from memfit.store import fingerprint; fingerprint(); print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
    found = fingerprint()
    assert found["python"].endswith(
        f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    )
    assert int(found["ram_bytes"]) > 2**28
    assert all(isinstance(v, str) and v for v in found.values())


def test_the_fingerprint_records_thread_settings_and_missing_packages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.setattr(environment_module, "PACKAGES", ("numpy", "no-such-package-here"))
    found = fingerprint()
    assert (found["env OMP_NUM_THREADS"], found["env MKL_NUM_THREADS"]) == ("3", "unset")
    assert found["no-such-package-here"] == "not installed"
    assert found["numpy"][0].isdigit()


def test_processor_and_gpu_names_are_read_from_kernel_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Fast Chip 9000\nflags\t: a b\n")
    assert environment_module._processor(tmp_path / "cpuinfo") == "Fast Chip 9000"
    assert environment_module._processor(tmp_path / "missing")
    files = {
        "proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ: 1\n",
        "sys/bus/pci/drivers/amdgpu/0000:02:00.0/product_name": "AMD Instinct MI300X OAM\n",
        "sys/bus/pci/drivers/amdgpu/0000:03:00.0/product_name": "\n",  # a card that has none
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(devices, "_ROOT", tmp_path)
    monkeypatch.setattr(devices, "accelerators", functools.cache(lambda: ()))  # torch was not asked yet
    assert fingerprint()["accelerators"] == "NVIDIA H100 80GB HBM3, AMD Instinct MI300X OAM"


def test_the_environment_names_the_accelerators_that_torch_has_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever makes them: their drivers need no files that memfit knows."""
    found = devices.Accelerator(device="sim:0", name="Simulated accelerator", total_bytes=1, free_bytes=1)
    asked = functools.cache(lambda: (found, found))
    monkeypatch.setattr(devices, "_ROOT", tmp_path)
    monkeypatch.setattr(devices, "accelerators", asked)
    assert fingerprint()["accelerators"] == "none seen"
    asked()
    assert fingerprint()["accelerators"] == "Simulated accelerator, Simulated accelerator"


@given(st.dictionaries(st.text(), st.text(), min_size=1, max_size=5))
def test_law_digest_ignores_order_and_sees_every_change(environment: dict[str, str]) -> None:
    assert digest(dict(reversed(environment.items()))) == digest(environment)
    key = next(iter(environment))
    assert digest(environment | {key: environment[key] + "x"}) != digest(environment)
