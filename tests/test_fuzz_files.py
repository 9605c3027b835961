"""Files and texts from anywhere: one line says what is wrong, without a traceback, a hang, or memory for nothing.

Every test draws its mutations from a seed; a failure names the mutation, which stays in the test's folder.
"""

from __future__ import annotations

import json
import random
import resource
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import ROOT
from dcn_kernels.cli import bench, sampling

from dcn_kernels import OPS, environment
from dcn_kernels.bench import profiling, record

COUNT = 500
SECONDS, BYTES = 10.0, 1 << 30  # of the processor for one mutation, the first of which may import matplotlib; of all
# What stands in place of a value
HOSTILE: list[Any] = [
    None, True, -1, 0, 1, 0.5, 1e308, -1e308, 10**30, 2**31, 2**63, 999999, 65536, float("nan"), float("inf"), "", "x",
    "\ud800", "\x1b[31m", "\x00", "a|b", "\n", "é" * 300, "$\\bad{$",
    [], [1], [[]], {}, {"a": 1}, [0] * 100, "1" * 5000,
]  # fmt: skip


@pytest.fixture(autouse=True)
def bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In a folder of its own; a machine of 1 GB on which nothing is measured; memory does not grow."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environment, "memory", lambda: 10**9)
    monkeypatch.setattr(profiling, "profile", lambda *_: iter(()))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < BYTES


def ends_well(*arguments: str) -> int:
    """The command's exit code: no traceback, one line of error, nothing that steers a terminal, soon."""
    start = time.process_time()
    result = CliRunner().invoke(bench.main, list(arguments))
    assert time.process_time() - start < SECONDS
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code in (0, 1, 2)
    assert all(line.isprintable() for line in result.output.split("\n")), repr(result.output)
    if result.exit_code == 2:
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.exit_code


def damaged(rng: random.Random, content: bytes) -> bytes:
    """Some bytes changed, left out, doubled, or the end lost."""
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at = rng.randrange(len(changed) + 1)
        end = min(len(changed), at + rng.choice([1, 1, 2, 8, 40]))
        kind = rng.randrange(5)
        if kind == 0:
            changed[at:end] = rng.randbytes(end - at)
        elif kind == 1:
            del changed[at:end]
        elif kind == 2:
            changed[at:at] = changed[at:end] * rng.choice([1, 3, 1000])
        elif kind == 3:
            changed[at:end] = rng.choice([b"9" * 40, b"-1", b'"', b"[" * 3000, b"\x1b[2J", b"\xed\xa0\x80", b"1e999"])
        elif rng.random() < 0.2:
            del changed[at:]
    return bytes(changed)


def with_another_value(rng: random.Random, value: Any, hostile: list[Any]) -> Any:
    """A copy of nested values where one, anywhere, is hostile, missing or there under another name."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.15:
        alike = [other for other in hostile if type(other) is type(value)]
        return rng.choice(alike if alike and rng.random() < 0.6 else hostile)
    copy = dict(value) if isinstance(value, dict) else list(value)
    key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    if rng.random() < 0.1:
        removed = copy.pop(key)
        if isinstance(copy, dict) and rng.random() < 0.5:
            copy[rng.choice([name for name in hostile if isinstance(name, str)])] = removed
    else:
        copy[key] = with_another_value(rng, value[key], hostile)
    return copy


def test_records(tmp_path: Path) -> None:
    found = record.read(ROOT / "bench_results" / "cpu-2026-11-21-spread2-forward.json")
    found["rows"] = [{**row, "samples_ms": row["samples_ms"][:6]} for row in found["rows"][:2]]
    whole = record.to_json(found)
    Path("whole.json").write_text(whole)
    Path("folder").mkdir()
    rng = random.Random(0)
    accepted = 0
    for number in range(COUNT):
        if number % 2:
            content = damaged(rng, whole.encode())
        else:
            content = json.dumps(with_another_value(rng, found, HOSTILE)).encode()
        Path("folder", "one.json").write_bytes(content)
        read = ends_well("compare", "whole.json", "folder/one.json") != 2
        assert (ends_well("readme", "--folder", "folder") == 0) == read
        accepted += read
        if read and accepted % 5 == 0:
            what = rng.choice(["speed", "memory", "scaling", "cost"])
            ends_well("plot", "folder/one.json", "-o", "picture.png", "--what", what)
    assert 20 < accepted < COUNT / 2


def test_a_record_of_too_many_samples_or_bytes_is_refused() -> None:
    found = record.read(ROOT / "bench_results" / "cpu-2026-11-21-spread2-forward.json")
    found["rows"][0]["samples_ms"] = [1.0] * 1_000_000
    Path("many.json").write_text(record.to_json(found))
    assert ends_well("compare", "many.json", "many.json") == 2
    with Path("large.json").open("wb") as file:
        file.truncate(1 << 40)
    assert ends_well("compare", "large.json", "large.json") == 2


def test_shape_files() -> None:
    tables = {
        "conv": {"op": "deform_conv2d", "N": 2, "C": 8, "H": 9, "W": 10, "O": 8, "kernel": [3, 3], "padding": 1},
        "roi": {"op": "deform_ps_roi_pool", "C": 98, "H": 9, "W": 10, "R": 3, "spread": 0.5, "spatial_scale": 0.1},
        "field": {"op": "offset_sample2d", "sizes": "1x8x9x10,offset_groups=4"},
    }

    def toml(nested: Any) -> str:
        lines = []
        for name, table in nested.items():
            lines.append(f"[layers.{json.dumps(name)}]" if isinstance(table, dict) else f"layers = {json.dumps(table)}")
            if isinstance(table, dict):
                lines += [f"{json.dumps(key)} = {toml_value(value)}" for key, value in table.items()]
        return "\n".join(lines)

    def toml_value(value: Any) -> str:
        text = json.dumps(value, ensure_ascii=False)
        return {"NaN": "nan", "Infinity": "inf", "null": "none"}.get(text, text)

    rng = random.Random(1)
    accepted = 0
    for number in range(COUNT):
        if number % 3:
            changed = with_another_value(rng, tables, HOSTILE)
            content = toml(changed if isinstance(changed, dict) else {}).encode("utf-8", "surrogatepass")
        else:
            content = damaged(rng, toml(tables).encode())
        Path("layers.toml").write_bytes(content)
        listed = ends_well("profile", "--shapes", "layers.toml", "--list")
        accepted += listed == 0
        timed = ends_well("profile", "--shapes", "layers.toml", "--no-save")
        assert listed == 0 or timed == 2
    assert 20 < accepted < COUNT / 2


def test_shapes() -> None:
    rng = random.Random(2)
    pieces = [*"NCHWORx:=,. ", *"0123456789", "kernel", "padding", "groups", "65536", "1000000000", "9" * 5000, "-1",
              "1e3", "²", "\x1b", "1x8x9x10", ":8", ":3x3", "spread", "nan", "output_size"]  # fmt: skip
    starts = ["N=1,C=8,H=9,W=10,O=8,kernel=3x3", "1x8x9x10:8:3x3,padding=1", "1x8x9x10"]
    accepted = 0
    for _ in range(COUNT):
        text = rng.choice(starts)
        for _ in range(rng.choice([1, 1, 2, 4])):
            at = rng.randrange(len(text) + 1)
            text = text[:at] + rng.choice(pieces) + text[at + rng.choice([0, 0, 1, 3]) :]
        op = rng.choice(["deform_conv2d"] * 2 + ["offset_sample2d", *OPS])
        accepted += ends_well("profile", "--op", op, f"--shape={text}", "--no-save") == 1
    assert 10 < accepted < COUNT / 2


def npy(header: str, data: bytes) -> bytes:
    text = header.encode("latin-1", "replace") + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def test_npy_offsets(tmp_path: Path) -> None:
    marker = tmp_path / "a pickle was loaded"

    class Trap:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return Path.touch, (marker,)

    np.save("objects.npy", np.array([[[[Trap()]]]], object), allow_pickle=True)
    assert ends_well("sampling", "--offset", "objects.npy") == 2 and not marker.exists()
    Path("terabytes.npy").write_bytes(
        npy("{'descr': '<f8', 'fortran_order': False, 'shape': (100000, 18, 999, 999)}", b"")
    )
    assert ends_well("sampling", "--offset", "terabytes.npy") == 2

    np.save("whole.npy", np.random.default_rng(0).standard_normal((1, 18, 3, 4)).astype(np.float32))
    whole = Path("whole.npy").read_bytes()
    assert ends_well("sampling", "--offset", "whole.npy") == 0
    rng = random.Random(3)
    kinds = ["'<f4'", "'<f8'", "'>f4'", "'|O'", "'<c8'", "'<U9'", "'|V4'", "[('a', '<f4')]", "'<m8[s]'", "'|b1'", "'x'"]
    lengths = ["0", "1", "2", "3", "4", "18", "-1", "65536", "10**9", "999999999999", "True", "1.5", "None", "'a'"]
    accepted = 0
    for number in range(2 * COUNT):  # every second one a header of our own
        if number % 2:
            shape = ["1", "18", "3", "4"]
            for _ in range(rng.randrange(3)):
                shape[rng.randrange(4)] = rng.choice(lengths)
            order = rng.choice(["True", "False", "False", "2"])
            kind = rng.choice(kinds[:2] if rng.random() < 0.5 else kinds)
            header = f"{{'descr': {kind}, 'fortran_order': {order}, 'shape': ({', '.join(shape)})}}"
            content = npy(header, rng.randbytes(rng.choice([216 * 4, 216 * 8, 0, 100])))
        else:
            content = damaged(rng, whole)
        Path("one.npy").write_bytes(content)
        options = rng.choice([[], [], ["--kernel", "65536"], ["--stride", "9" * 30], ["--input-size", "999999x999999"]])
        accepted += ends_well("sampling", "--offset", "one.npy", *options) == 0
    assert 40 < accepted < COUNT * 1.5 and not marker.exists()


def png(width: int, height: int, data: bytes) -> bytes:
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(data)),
        (b"IEND", b""),
    ]
    chunks = (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_images(capsys: pytest.CaptureFixture[str]) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8)
    for name in ("jpg", "gif", "bmp", "tiff"):
        image.fromarray(pixels).save(f"whole.{name}")
    Path("whole.png").write_bytes(png(20, 24, b"".join(b"\0" + row.tobytes() for row in pixels)))
    assert sampling._picture("whole.png").shape == (24, 20, 3)
    for name, content in {"12000": png(12000, 12000, b""), "all": png(2**31 - 1, 2**31 - 1, b""), "none": b""}.items():
        Path(f"{name}.png").write_bytes(content)
        with pytest.raises(SystemExit):
            sampling._picture(f"{name}.png")
    assert "16,777,216 pixels, got 12000 x 12000" in capsys.readouterr().err
    rng = random.Random(4)
    accepted = 0
    for number in range(COUNT):
        name = ("png", "png", "jpg", "gif", "bmp", "tiff")[number % 6]
        Path(f"one.{name}").write_bytes(damaged(rng, Path(f"whole.{name}").read_bytes()))
        start = time.process_time()
        try:
            accepted += sampling._picture(f"one.{name}").ndim >= 2
        except SystemExit as ended:
            assert ended.code == 2
            said = capsys.readouterr().err
            assert said.startswith("error: --image: ") and said.count("\n") == 1 and said.strip().isprintable()
        assert time.process_time() - start < SECONDS
    assert 20 < accepted < COUNT * 0.9


def test_a_layer_has_a_name_that_its_record_can_hold() -> None:
    Path("layers.toml").write_text('[layers."\\u001b[31mred"]\nC = 4\nH = 8\nW = 9\nO = 4\n')
    assert ends_well("profile", "--shapes", "layers.toml", "--list") == 2
