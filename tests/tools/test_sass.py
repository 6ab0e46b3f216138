"""Reading binaries: which instructions belong to the inner loop."""

from tools.sass import Instruction, _parse_sass, inner_loop, load_bytes, longest_way, read_amdgcn

# The latch of the inner loop stands before its header and falls into it; an out-of-line block follows the loop.
AMD = """
\ts_cbranch_scc1 .LBB0_5
\ts_branch .LBB0_2
.LBB0_1:
\tv_add_u32_e32 v1, v1, v2
\ts_cbranch_scc0 .LBB0_5
.LBB0_2:
\ts_cbranch_execz .LBB0_4
.LBB0_3:
\tglobal_load_dwordx4 v[2:5], v[2:3], off
\ts_branch .LBB0_1
.LBB0_4:
\tv_mul_f32_e32 v1, v1, v2
\ts_branch .LBB0_3
.LBB0_5:
\tglobal_store_dword v1, v2, off
\ts_endpgm
  .vgpr_count: 7
"""

SASS = """
        /*0000*/                   LDG.E R1, desc[UR4][R2.64] ;
.L_x_0:
        /*0010*/                   MOV R4, RZ ;
.L_x_1:
        /*0020*/              @!P0 LDG.E.128 R8, desc[UR4][R2.64] ;
        /*0030*/                   IADD3 R4, R4, R8, RZ ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/                   BRA P2, `(.L_x_0) ;
        /*0060*/                   EXIT ;
"""


def test_blocks_out_of_line_belong_to_their_loop() -> None:
    binary = read_amdgcn(AMD)
    assert binary.loop_loads == (16,)
    assert binary.loop["v_add_u32_e32"] == binary.loop["v_mul_f32_e32"] == 1
    assert "global_store_dword" not in binary.loop
    assert binary.integer_instructions == 1
    assert binary.registers == 7


def test_the_innermost_of_nested_loops() -> None:
    instructions = _parse_sass(SASS)
    assert [i.opcode for i in inner_loop(instructions)] == ["LDG.E.128", "IADD3", "BRA"]
    assert [i.falls_through for i in instructions] == [True, True, True, True, True, True, False]


def test_no_loop() -> None:
    assert inner_loop([Instruction(0, "LDG.E"), Instruction(16, "EXIT", falls_through=False)]) == []


def test_the_longest_way_repeats_no_loop() -> None:
    instructions = _parse_sass(SASS)
    assert longest_way(instructions, []) == len(instructions)
    assert longest_way(instructions, inner_loop(instructions)) == 4
    # Of two branches the longer, and the end of the shorter does not count.
    branch = [
        Instruction(0, "MOV"), Instruction(16, "BRA", target=64), Instruction(32, "FADD"), Instruction(48, "FADD"),
        Instruction(64, "STG"), Instruction(80, "BRA", target=112), Instruction(96, "EXIT", falls_through=False),
        Instruction(112, "EXIT", falls_through=False),
    ]  # fmt: skip
    assert longest_way(branch, []) == 7
    assert longest_way([], []) == 0


def test_widths_of_loads() -> None:
    widths = {"LDG.E.128": 16, "LDG.E.64": 8, "LDG.E": 4, "LDG.E.U8": 1, "LDS.128": 0, "global_load_dwordx2": 8}
    assert {opcode: load_bytes(opcode) for opcode in widths} == widths
