from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from gemma_serve.engine.load_progress import Progress, progress_of
from gemma_serve.engine.process_output import EngineOutput, formatted_stderr


def captured(code: str) -> tuple[list[str], str | None]:
    """What a child's stderr becomes, and the root cause that was found in it."""
    reader, writer = os.pipe()
    out_reader, out_writer = os.pipe()
    output = EngineOutput(out_writer)
    thread = threading.Thread(target=output.forward, args=(reader,))
    thread.start()
    process = subprocess.Popen([sys.executable, "-c", code], stderr=writer)
    os.close(writer)
    with os.fdopen(out_reader, "rb") as file:
        lines = file.read().decode().splitlines()
    assert process.wait(30) == 0
    thread.join()
    return lines, output.root_cause()


def test_a_burst_of_foreign_lines_passes() -> None:
    lines, _ = captured(
        "import sys\nfor i in range(20000): sys.stderr.write(f'NCCL INFO line {i} {\"x\" * 50}\\n')"
    )
    assert len(lines) == 20_000
    assert all(" - INFO - [engine] NCCL INFO line " in line for line in lines)


def test_our_lines_pass_as_they_are_and_the_last_needs_no_end() -> None:
    ours = "2026-01-01 00:00:00,000 - ERROR - [EngineCore] ValueError: no memory"
    lines, cause = captured(f'import sys; sys.stderr.write({ours!r} + \'\\n{{"time":"x"}}\\nlast\')')
    assert lines[:2] == [ours, '{"time":"x"}']
    assert lines[2].endswith("[engine] last")
    assert cause == "ValueError: no memory"


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        (-9, "process VllmWorker-0 was ended by SIGKILL: is the machine, or the container, short of memory?"),
        (-11, "process VllmWorker-0 was ended by SIGSEGV"),
        (-99, "process VllmWorker-0 was ended by signal 99"),
        (1, "RuntimeError: no such kernel"),
    ],
)
def test_how_a_worker_died_is_told(code: int, cause: str) -> None:
    lines = [
        "2026-01-01 00:00:00,000 - ERROR - [Worker] RuntimeError: no such kernel",
        "2026-01-01 00:00:00,000 - ERROR - [EngineCore] Worker proc VllmWorker-0 died unexpectedly "
        f"(exit code: {code}), shutting down executor.",
        "2026-01-01 00:00:00,000 - ERROR - [EngineCore] RuntimeError: cancelled",
    ]
    _, found = captured(f"import sys; sys.stderr.write({chr(10).join(lines)!r})")
    assert found is not None and found.endswith(cause)


def test_a_progress_bar_is_thinned_out() -> None:
    lines, _ = captured("import sys\nfor i in range(1000): sys.stderr.write(f'\\rLoading {i}')")
    assert 1 <= len(lines) < 100
    assert lines[-1].endswith("Loading 999")


def test_a_line_without_an_end_is_cut() -> None:
    lines, _ = captured("import sys; sys.stderr.buffer.write(b'\\xff' * 1_000_000)")
    assert sum(line.count("�") for line in lines) == 1_000_000
    assert len(lines) > 5


def test_a_lost_reader_of_our_log_does_not_block_the_engine() -> None:
    reader, writer = os.pipe()
    out_reader, out_writer = os.pipe()
    os.close(out_reader)
    thread = threading.Thread(target=EngineOutput(out_writer).forward, args=(reader,))
    thread.start()
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stderr.write('x\\n' * 200_000)"], stderr=writer
    )
    os.close(writer)
    assert process.wait(30) == 0
    thread.join()


def test_this_process_has_its_stderr_back() -> None:
    before = os.fstat(2)
    with formatted_stderr():
        assert os.fstat(2) != before
    assert os.path.samestat(os.fstat(2), before)


@pytest.mark.parametrize(
    ("line", "progress"),
    [
        (
            "Loading safetensors checkpoint shards:  50% Completed | 1/2 [00:00<00:00, 55.70it/s]",
            Progress("loading the weights", 0.5),
        ),
        (
            "Multi-thread loading pt checkpoint shards: 100% Completed | 2/2 [00:00<?, ?it/s]",
            Progress("loading the weights", 1.0),
        ),
        (
            "Capturing CUDA graphs (decode, FULL):  12%|#2  | 8/67 [00:01<00:09,  6.20it/s]",
            Progress("capturing CUDA graphs", 0.12),
        ),
        (
            "model-00001-of-00002.safetensors:   3%|3   | 147M/4.97G [00:02<01:18, 61.3MB/s]",
            Progress("downloading the weights", 0.03),
        ),
        ("INFO [Worker] Warming up model for the compilation...", Progress("compiling", None)),
        ("INFO [Worker] Dynamo bytecode transform time: 4.31 s", Progress("compiling", None)),
        ("INFO [EngineCore] Loading weights took 0.02 seconds", None),
        ("Enforce eager set, disabling torch.compile and CUDAGraphs", None),
    ],
)
def test_how_far_a_load_is(line: str, progress: Progress | None) -> None:
    assert progress_of(line) == progress


def test_the_progress_of_each_line_is_told() -> None:
    told: list[Progress] = []
    reader, writer = os.pipe()
    with open(os.devnull, "wb") as nowhere:
        output = EngineOutput(os.dup(nowhere.fileno()), told.append)
    with os.fdopen(writer, "w") as bar:
        for percent in range(0, 101, 10):
            bar.write(f"\rLoading safetensors checkpoint shards: {percent}% Completed")
    output.forward(reader)
    assert [progress.share for progress in told] == [percent / 100 for percent in range(0, 101, 10)]
