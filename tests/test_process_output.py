from __future__ import annotations

import os
import subprocess
import sys
import threading

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
