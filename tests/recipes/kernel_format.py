"""A kernel format: IEEE half precision. One function in C++ widens a panel to floats; the generic paths do the rest."""

from .recipe import Edit, Recipe

CHECK = """
import torch
import manyhands as mh
from manyhands.check.parts import part_jobs
from manyhands.config import Packing
from manyhands.kernels import native
from manyhands.quant import pack_linear

assert native.available(), native.missing()
assert Packing(format="fp16").format == "fp16"
torch.manual_seed(0)
w = torch.randn(48, 100)
packed = pack_linear(w, None, "fp16")
assert torch.equal(packed.dequantize()[0], w.half().float())
for level in native.levels():
    for rows in (1, 4, 5, 16, 17, 300):
        x = torch.randn(rows, 100)
        exact = x.double() @ w.half().double().T
        found = native.linear(x, packed, level=level).double()
        rounds = level in ("avx512_bf16", "amx")  # rows, to bfloat16
        near = {"rtol": 3e-2, "atol": 0.2} if rounds else {"rtol": 1e-5, "atol": 1e-4}
        torch.testing.assert_close(found, exact, **near)
rows = [row for what, _, rows in part_jobs(0, ["float32"]) if what == "fp16 records" for row in rows()]
assert len(rows) > 20 and all(row.ok for row in rows), [row for row in rows if not row.ok]
"""

WIDEN = """// IEEE half precision, bit by bit: no level needs an instruction for it.
inline float from_half(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * static_cast<float>(fraction) * 0x1p-24f;
  const uint32_t bits = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

void widen_fp16(const Panel& p, int64_t k, int64_t n, float* out) {
  const uint16_t* line = reinterpret_cast<const uint16_t*>(p.data) + 16 * k;
  for (int64_t i = 0; i < n; i += 2, line += 32, out += 32)
    for (int64_t j = 0; j < 16; j++) out[j] = from_half(line[2 * j]), out[16 + j] = from_half(line[2 * j + 1]);
}

"""

RECIPE = Recipe(
    "Add a kernel format",
    (
        Edit("manyhands/config/packing.py", ', "fp16"', after='"int8", "int4", "q8_0", "q4_0"'),
        Edit(
            "manyhands/config/packing.py",
            '    "fp16": Traits(16),\n',
            after='    "q4_0": Traits(4, "fp16", (32,)),\n',
        ),
        Edit(
            "manyhands/quant/panels.py",
            """    if matrix.format == "fp16":
        return _interleave(padded.half(), 2).view(torch.uint8).flatten(), None
""",
            after="    padded = to_panels(w.detach().cpu(), matrix)\n",
        ),
        Edit(
            "manyhands/quant/panels.py",
            """    if matrix.format == "fp16":
        panels = section.view(torch.float16).view(matrix.panels, -1, PANEL, 2)
        return from_panels(_deinterleave(panels).float(), matrix)
""",
            after='the weights the record stands for, float32(q) · float32(scale)."""\n',
        ),
        Edit("native/manyhands.h", "  MH_FP16,\n", after="  MH_Q4_0,\n"),
        Edit(
            "native/format.h",
            '    {.name = "fp16", .bits = 16},\n',
            after='    {.name = "q4_0", .bits = 4, .scale_bytes = 2, .grouped = true, .half = true, .integer = true, '
            ".exact = true},\n",
        ),
        Edit("native/formats.inl", WIDEN, after="// ---- As floats. ----\n\n"),
        Edit(
            "native/formats.inl",
            "    {{}, widen_fp16},\n",
            after="    {{}, widen_nibbles<MH_Q4_0>},\n",
        ),
        Edit(
            "manyhands/check/oracle_records.py",
            ', "fp16": 16',
            after='"int4": 4, "q8_0": 8, "q4_0": 4',
        ),
        Edit(
            "manyhands/check/oracle_records.py",
            """    if m.format == "fp16":
        return record[(start + 2 * index)[..., None] + torch.arange(2)].view(torch.float16)[..., 0].double()
""",
            after="        return _halves(record, start + 2 * index)\n",
        ),
    ),
    CHECK,
    build=True,
)
