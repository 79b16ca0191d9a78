"""The PTX instructions that the kernels use, each as a C++ statement over instructions.h.

The semantics are those of NVIDIA's "Parallel Thread Execution ISA".
"""

from __future__ import annotations

import re

from .operands import C_TYPES, Operands, UnknownInstruction, assignment, instruction, members

COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
OPERATOR = {"add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^"}

# ---------------------------------------------------------------------------------------------------- arithmetic


@instruction(r"(add|sub|mul\.lo)\.([su])(16|32|64)")
def _integer(m: re.Match[str], a: list[str], o: Operands) -> str:
    kind = f"u{m[3]}" if m[3] != "16" else "u32"
    d, x, y = a
    return f"{o.name(d)} = {o.value(x, kind)} {OPERATOR[m[1][:3]]} {o.value(y, kind)};"


@assignment(r"mul\.wide\.([su])(16|32)")
def _wide(m: re.Match[str], a: list[str], o: Operands) -> str:
    kind, wide = m[1] + m[2], C_TYPES[f"{m[1]}{2 * int(m[2])}"]
    return f"({wide})({o.value(a[1], kind)}) * ({wide})({o.value(a[2], kind)})"


@assignment(r"mul\.hi\.([su])(32|64)")
def _high(m: re.Match[str], a: list[str], o: Operands) -> str:
    wide = "unsigned __int128" if m[1] == "u" else "__int128"
    x, y = (f"({wide})({o.value(v, m[1] + m[2])})" for v in a[1:])
    return f"({x} * {y}) >> {m[2]}"


@assignment(r"mad\.lo\.[su](32|64)")
def _multiply_add(m: re.Match[str], a: list[str], o: Operands) -> str:
    x, y, z = (o.value(v, f"u{m[1]}") for v in a[1:])
    return f"{x} * {y} + {z}"


@assignment(r"(div|rem)\.([su](?:32|64))")
def _divide(m: re.Match[str], a: list[str], o: Operands) -> str:
    function = {"div": "quotient", "rem": "remainder"}[m[1]]
    return f"ptx::{function}<{C_TYPES[m[2]]}>({o.value(a[1], m[2])}, {o.value(a[2], m[2])})"


@assignment(r"(and|or|xor)\.(pred|b16|b32|b64)")
def _logic(m: re.Match[str], a: list[str], o: Operands) -> str:
    kind = m[2]
    return f"{o.value(a[1], kind)} {OPERATOR[m[1]]} {o.value(a[2], kind)}"


@assignment(r"not\.(pred|b16|b32|b64)")
def _not(m: re.Match[str], a: list[str], o: Operands) -> str:
    return f"{'!' if m[1] == 'pred' else '~'}{o.value(a[1], m[1])}"


@assignment(r"(shl|shr)\.([bus](?:16|32|64))")
def _shift(m: re.Match[str], a: list[str], o: Operands) -> str:
    function = {"shl": "left", "shr": "right"}[m[1]]
    return f"ptx::shift_{function}<{C_TYPES[m[2]]}>({o.value(a[1], m[2])}, {o.value(a[2], 'u32')})"


@assignment(r"(min|max)\.([su](?:16|32|64))")
def _least(m: re.Match[str], a: list[str], o: Operands) -> str:
    x, y = (o.value(v, m[2]) for v in a[1:])
    return f"ptx::{m[1]}<{C_TYPES[m[2]]}>({x}, {y})"


@assignment(r"(min|max)\.f32")
def _least_float(m: re.Match[str], a: list[str], o: Operands) -> str:
    return f"__builtin_f{m[1]}f({o.value(a[1], 'f32')}, {o.value(a[2], 'f32')})"


@assignment(r"neg\.(s16|s32|s64|f32)")
def _negative(m: re.Match[str], a: list[str], o: Operands) -> str:
    return f"-{o.value(a[1], m[1].replace('s', 'u'))}"


@assignment(r"abs\.f32")
def _magnitude(m: re.Match[str], a: list[str], o: Operands) -> str:
    return f"__builtin_fabsf({o.value(a[1], 'f32')})"


@assignment(r"bfi\.b64")
def _insert_bits(m: re.Match[str], a: list[str], o: Operands) -> str:
    if a[3:] != ["32", "32"]:
        raise UnknownInstruction("only the upper half is inserted")
    return f"{o.value(a[1])} << 32 | (uint32_t){o.value(a[2])}"


@assignment(r"(add|sub|mul)(?:\.rn)?\.(f32|f64)")
def _float(m: re.Match[str], a: list[str], o: Operands) -> str:
    return f"{o.value(a[1], m[2])} {OPERATOR[m[1]]} {o.value(a[2], m[2])}"


@assignment(r"fma\.(rn|rm)\.f32")
def _fused(m: re.Match[str], a: list[str], o: Operands) -> str:
    function = {"rn": "__builtin_fmaf", "rm": "ptx::fma_down"}[m[1]]
    return f"{function}({', '.join(o.value(v, 'f32') for v in a[1:])})"


@instruction(r"div\.(rn|approx)\.f32")
def _quotient(m: re.Match[str], a: list[str], o: Operands) -> str:
    x, y = (o.value(v, "f32") for v in a[1:])
    return f"{o.name(a[0])} = " + (f"{x} / {y};" if m[1] == "rn" else f"ptx::divide_roughly({x}, {y});")


@assignment(r"(rcp\.rn|sqrt\.rn|ex2\.approx\.ftz)\.f32")
def _function(m: re.Match[str], a: list[str], o: Operands) -> str:
    before, after = {"rcp": ("1.0f / ", ""), "sqrt": ("__builtin_sqrtf(", ")"), "ex2": ("ptx::exp2_flushed(", ")")}[
        m[1].split(".")[0]
    ]
    return f"{before}{o.value(a[1], 'f32')}{after}"


@assignment(r"setp\.(eq|ne|lt|le|gt|ge)\.([bus](?:16|32|64))")
def _compare(m: re.Match[str], a: list[str], o: Operands) -> str:
    return f"{o.value(a[1], m[2])} {COMPARE[m[1]]} {o.value(a[2], m[2])}"


@instruction(r"setp\.(eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|nan|num)\.f32")
def _compare_floats(m: re.Match[str], a: list[str], o: Operands) -> str:
    x, y = (o.value(v, "f32") for v in a[1:])
    nan = f"__builtin_isunordered({x}, {y})"
    if m[1] in ("nan", "num"):
        return f"{o.name(a[0])} = {'!' if m[1] == 'num' else ''}{nan};"
    plain = f"{x} {COMPARE[m[1][:2]]} {y}"
    return f"{o.name(a[0])} = " + (f"{nan} || {plain};" if len(m[1]) == 3 else f"!{nan} && {plain};")


@assignment(r"selp\.([bus](?:16|32|64)|f32)")
def _select(m: re.Match[str], a: list[str], o: Operands) -> str:
    return f"{o.value(a[3])} ? {o.value(a[1], m[1])} : {o.value(a[2], m[1])}"


# ----------------------------------------------------------------------------------------- moves and conversions


@instruction(r"mov\.(pred|[bus](?:16|32|64)|f32)")
def _move(m: re.Match[str], a: list[str], o: Operands) -> str:
    d, s = a
    bits = re.sub(r"\D", "", m[1])
    half = int(bits or 0) // 2
    if d.startswith("{"):
        whole = o.value(s, f"b{bits}")
        return "{ " + " ".join(f"{o.name(x)} = {whole} >> {half * i};" for i, x in enumerate(members(d))) + " }"
    if s.startswith("{"):
        parts = members(s)
        if o.type_of(d) == "f32" and parts[0] == "0":  # how sm_80 widens bfloat16
            return f"{o.name(d)} = ptx::from_bf16({o.value(parts[1], 'b16')});"
        low, high = (o.value(x, f"b{half}") for x in parts)
        return f"{o.name(d)} = (uint{bits}_t){high} << {half} | {low};"
    return f"{o.name(d)} = {o.value(s, o.type_of(d))};"


@assignment(r"cvt\.([su](?:8|16|32|64))\.([su](?:8|16|32|64))")
def _resize(m: re.Match[str], a: list[str], o: Operands) -> str:
    return f"({C_TYPES[m[1]]})({C_TYPES[m[2]]}){o.value(a[1])}"


@assignment(r"cvt\.rn\.f32\.([su](?:16|32|64)|f64)|cvt\.f64\.(f32)")
def _to_float(m: re.Match[str], a: list[str], o: Operands) -> str:
    to = "float" if m[1] else "double"
    return f"({to})({C_TYPES[m[1] or m[2]]}){o.value(a[1])}"


@assignment(r"cvt\.rzi\.s32\.f32")
def _truncate(m: re.Match[str], a: list[str], o: Operands) -> str:
    return f"ptx::truncate({o.value(a[1], 'f32')})"


@assignment(r"cvt\.sat\.f32\.f32")
def _saturate(m: re.Match[str], a: list[str], o: Operands) -> str:
    return f"ptx::saturate({o.value(a[1], 'f32')})"


@assignment(r"cvt\.f32\.(bf16|f16)")
def _widen(m: re.Match[str], a: list[str], o: Operands) -> str:
    return f"ptx::from_{m[1]}({o.value(a[1], 'b16')})"


@assignment(r"cvt\.rn\.(bf16|f16)\.f32")
def _narrow(m: re.Match[str], a: list[str], o: Operands) -> str:
    return f"ptx::to_{m[1]}({o.value(a[1], 'f32')})"


@assignment(r"cvt\.rn(\.relu)?\.(bf16|f16)x2\.f32")
def _narrow_two(m: re.Match[str], a: list[str], o: Operands) -> str:
    high, low = (f"ptx::relu({o.value(v, 'f32')})" if m[1] else o.value(v, "f32") for v in a[1:])
    return f"(uint32_t)ptx::to_{m[2]}({high}) << 16 | ptx::to_{m[2]}({low})"


@assignment(r"cvta(\.to)?\.(global|shared)\.u64")
def _convert_address(m: re.Match[str], a: list[str], o: Operands) -> str:
    if m[2] == "global":
        return f"{o.value(a[1])}"
    function = "generic_to_shared" if m[1] else "shared_to_generic"
    return f"ptx::{function}({o.value(a[1])})"


@assignment(r"mapa\.u64")
def _map(m: re.Match[str], a: list[str], o: Operands) -> str:
    return f"ptx::in_block_of_rank({o.value(a[1])}, {o.value(a[2])})"


# --------------------------------------------------------------------------------------------------------- memory


@instruction(r"ld(\.param|\.global|\.shared)?(?:\.nc|\.cg)?(?:\.v([24]))?\.([busf](?:8|16|32|64))")
def _load(m: re.Match[str], a: list[str], o: Operands) -> str:
    space, count, c_type = (m[1] or ".generic")[1:], int(m[2] or 1), C_TYPES[m[3]]
    _, address = o.address(a[1])
    number = "" if space == "param" else f", {o.take_number()}"
    parts = []
    for i, d in enumerate(members(a[0])):
        kind = o.type_of(d)
        value = f"v[{i}]" if (kind[0] == "f") == (m[3][0] == "f") else f"__builtin_bit_cast({C_TYPES[kind]}, v[{i}])"
        parts.append(f"{o.name(d)} = {value};")
    if len(parts) != count:
        raise UnknownInstruction("number of destinations")
    return f"{{ {c_type} v[{count}]; ptx::load_{space}(v, {address}, sizeof v{number}); {' '.join(parts)} }}"


@instruction(r"st(\.global|\.shared)?(?:\.cg)?(?:\.v([24]))?\.([busf](?:8|16|32|64))")
def _store(m: re.Match[str], a: list[str], o: Operands) -> str:
    space, count, kind = (m[1] or ".generic")[1:], int(m[2] or 1), m[3]
    _, address = o.address(a[0])
    values = [f"({C_TYPES[kind]}){o.value(v, kind)}" for v in members(a[1])]
    if len(values) != count:
        raise UnknownInstruction("number of sources")
    held = f"const {C_TYPES[kind]} v[{count}] = {{{', '.join(values)}}};"
    return f"{{ {held} ptx::store_{space}(v, {address}, sizeof v, {o.take_number()}); }}"


@assignment(r"ld\.acquire\.gpu\.u32")
def _acquire(m: re.Match[str], a: list[str], o: Operands) -> str:
    return f"ptx::load_acquire({o.address(a[1])[1]}, {o.take_number()})"


@assignment(r"atom(?:\.global)?\.(add|inc)(?:\.release\.gpu)?\.u32")
def _atomic(m: re.Match[str], a: list[str], o: Operands) -> str:
    return f"ptx::atomic_{m[1]}({o.address(a[1])[1]}, {o.value(a[2], 'u32')}, {o.take_number()})"


@instruction(r"cp\.async\.cg\.shared\.global")
def _copy(m: re.Match[str], a: list[str], o: Operands) -> str:
    if a[2] != "16":
        raise UnknownInstruction("size of a copy")
    to, source = o.address(a[0])[1], o.address(a[1])[1]
    return f"ptx::copy_async({to}, {source}, {o.value(a[3], 'u32') if len(a) == 4 else 16}, {o.take_number()});"


@instruction(r"cp\.async\.(commit|wait)_group")
def _copy_group(m: re.Match[str], a: list[str], o: Operands) -> str:
    return "ptx::copy_commit();" if m[1] == "commit" else f"ptx::copy_wait({o.value(a[0])});"


@instruction(r"ldmatrix\.sync\.aligned\.m8n8\.x4(\.trans)?\.shared\.b16")
def _load_matrix(m: re.Match[str], a: list[str], o: Operands) -> str:
    parts = " ".join(f"{o.name(d)} = v[{i}];" for i, d in enumerate(members(a[0])))
    transposed = "true" if m[1] else "false"
    return f"{{ uint32_t v[4]; ptx::load_matrix<{transposed}>(v, {o.address(a[1])[1]}, {o.take_number()}); {parts} }}"


@instruction(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(bf16|f16)\.\1\.f32")
def _multiply_matrices(m: re.Match[str], a: list[str], o: Operands) -> str:
    d, x, y, sums = (members(part) for part in a)
    held = ", ".join(o.value(v, "f32") for v in sums)
    x_values, y_values = (", ".join(o.value(v, "b32") for v in part) for part in (x, y))
    parts = " ".join(f"{o.name(v)} = d[{i}];" for i, v in enumerate(d))
    return (
        f"{{ float d[4] = {{{held}}}; const uint32_t a[4] = {{{x_values}}}, b[2] = {{{y_values}}}; "
        f"ptx::multiply_{m[1]}(d, a, b, {o.take_number()}); {parts} }}"
    )


# ------------------------------------------------------------------------------------------- threads and control


@instruction(r"(?:bar|barrier)\.sync")
def _barrier(m: re.Match[str], a: list[str], o: Operands) -> str:
    if a != ["0"]:
        raise UnknownInstruction("barrier other than 0, or of some threads")
    return f"ptx::barrier({o.take_number()});"


@instruction(r"bar\.warp\.sync")
def _warp_barrier(m: re.Match[str], a: list[str], o: Operands) -> str:
    return f"ptx::warp_barrier({o.value(a[0], 'u32')}, {o.take_number()});"


@instruction(r"barrier\.cluster\.(arrive\.release|wait\.acquire)\.aligned")
def _cluster_barrier(m: re.Match[str], a: list[str], o: Operands) -> str:
    return f"ptx::cluster_{m[1].split('.')[0]}({o.take_number()});"


@instruction(r"membar\.gl|fence\.acq_rel\.(gpu|cluster)|fence\.sc\.gpu")
def _fence(m: re.Match[str], a: list[str], o: Operands) -> str:
    return ";"  # one thread runs at a time; protocols.py is where fences matter


@instruction(r"shfl\.sync\.bfly\.b32")
def _shuffle(m: re.Match[str], a: list[str], o: Operands) -> str:
    d, _, there = a[0].partition("|")
    value = ", ".join(o.value(v, "b32") for v in a[1:])
    result = f"ptx::shuffle_xor({value}, {o.take_number()});"
    return f"{{ {o.name(d)} = {result} {f'{o.name(there)} = true; ' if there else ''}}}"


@instruction(r"bra(?:\.uni)?")
def _branch(m: re.Match[str], a: list[str], o: Operands) -> str:
    return f"goto {o.label(a[0])};"


@instruction(r"ret")
def _return(m: re.Match[str], a: list[str], o: Operands) -> str:
    return "return;"


@instruction(r"trap")
def _trap(m: re.Match[str], a: list[str], o: Operands) -> str:
    return "ptx::trap();"
