"""What is read from the kernels' machine code: by hand on a text, and on what NVRTC makes."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from dcn_kernels.cli.check import main

from dcn_kernels.check import machine_code
from dcn_kernels.cuda import compile

ASSEMBLY = """
.text.first:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
.L_x_2:
        /*0020*/              @!P0 LDG.E.128.CONSTANT R8, [R2.64] ;
        /*0030*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0040*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0050*/                   LDSM.16.M88.4 R8, [R2] ;
        /*0060*/               @P0 BRA `(.L_x_2) ;
        /*0070*/              @!P1 BRA `(.L_x_1) ;
.L_x_3:
        /*0080*/                   FFMA R1, R1, R1, R1 ;
        /*0090*/               @P0 BRA `(.L_x_3) ;
        /*00a0*/                   EXIT ;
.text.second:
        /*0000*/                   FFMA R1, R1, R1, R1 ;
        /*0010*/                   EXIT ;
"""


def test_main_loop_is_the_smallest_with_half_of_the_products() -> None:
    found = machine_code.loops(ASSEMBLY)
    assert found["first"] == {"matrix": 2, "global load, 16 bytes": 1, "ldmatrix": 1, "branch": 1}
    assert found["second"] == {}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("HMMA.1688.F32.TF32", "matrix"), ("LDG.E.U16", "global load, 2 bytes"), ("LDG.E", "global load, 4 bytes"),
        ("LDS.64", "shared load, 8 bytes"), ("LDSM.16.MT88.4", "ldmatrix"), ("LDGSTS.E.BYPASS.128", "copy to shared"),
        ("LDGDEPBAR", "barrier"), ("F2FP.F16.F32.PACK_AB", "convert"), ("RED.E.ADD.F32", "atomic"),
        ("ATOMG.E.ADD", "atomic"), ("IMAD.WIDE", "integer and other"), ("STS.128", "shared store, 16 bytes"),
    ],
)  # fmt: skip
def test_class_of_instruction(name: str, kind: str) -> None:
    assert machine_code.instruction_class(name) == kind


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "blocks"),
    [
        ("sm_90", 256, 252, 132 << 10, 1),  # registers: 65536 / (256 * 256)
        ("sm_90", 256, 128, 92 << 10, 2),  # both
        ("sm_90", 256, 32, 0, 8),  # threads: 2048 / 256
        ("sm_86", 256, 32, 0, 6),  # 1536 / 256
        ("sm_120", 256, 128, 100 << 10, 0),  # a block has 99 KB
        ("sm_80", 256, 128, 163 << 10, 1),
    ],
)
def test_blocks_of_a_multiprocessor(arch: str, threads: int, registers: int, shared: int, blocks: int) -> None:
    assert machine_code.blocks_per_multiprocessor(arch, threads, registers, shared) == blocks


def test_cycles_of_a_turn_are_those_of_its_instructions() -> None:
    loop = {"matrix": 2, "ldmatrix": 4, "shared load, 8 bytes": 1, "integer and other": 10, "branch": 1}
    assert machine_code.cycles("sm_80", 256, loop) == {
        "issue": 36.0,  # 18 instructions of 8 warps by 4 schedulers
        "matrix units": 32.0,  # 2 x 8 / 4 x 8
        "shared memory and L1": 144.0,  # 8 x (4 x 512 + 256) bytes / 128
        "integer units": 40.0,  # at half the rate
    }


def test_machine_code_of_a_kernel_is_read() -> None:
    try:
        program, nvrtc = machine_code.disassembler(), compile.NVRTC()
    except (machine_code.DisassemblerNotFound, compile.CompilerNotFound) as error:
        pytest.skip(str(error))
    rows = machine_code._read(program, nvrtc, "staging", compile.variants("staging", (9, 0))[0], "sm_90")
    assert [row["kernel"] for row in rows] == ["staging.copy"]
    assert rows[0]["threads"] == 256 and rows[0]["blocks"] >= 2 and rows[0]["bound"] in (*rows[0]["cycles"], "none")


def test_without_a_disassembler_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    result = CliRunner().invoke(main, ["kernels", "--detail", "--arch", "sm_90"])
    assert result.exit_code == 3 and "pip install nvidia-cuda-nvdisasm" in result.stderr, result.output
