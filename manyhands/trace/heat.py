"""Expert load as a picture: over time a heat map, at the end bars on the same rows; and a heat map as a PNG.

`charts.py` says how drawings and their labels lie on a page.
"""

import base64
import json
import math
import struct
import zlib

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from manyhands.trace.charts import short, tick_text, ticks
from manyhands.trace.series import Floats

_LEVELS = 60  # steps of the heat map from nothing to twice the fair share
_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-_"


def load_chart(
    load_CE: Floats,
    final_E: Floats,
    num_experts: int,
    x_range: tuple[float, float],
    dead_E: NDArray[np.bool_] | None = None,
) -> Markup:
    """Expert load over time as a heat map, and the final load as bars on the same rows.

    load_CE   [C, rows] load in fair shares over time (experts may be grouped into fewer rows).
    final_E   [rows] the final load in fair shares.
    x_range   first and last step.
    dead_E    [rows] where an expert got nothing at the end; default: where `final_E` is 0.
    """
    dead_E = final_E == 0 if dead_E is None else dead_E
    columns, rows = load_CE.shape
    level_CE = np.where(load_CE > 0, 1 + np.rint(np.clip(load_CE, 0, 2) * _LEVELS / 2), 0)
    level_EC = level_CE.T.astype(np.uint8)
    height = min(280, max(72, 14 * rows))
    longest = max(2.0, 1.1 * float(final_E.max()))
    row = 1000 / rows
    bars = {"fair": "", "over": "", "dead": ""}
    for i, load in enumerate(final_E):
        kind = "dead" if dead_E[i] else "over" if load > 1.5 else "fair"
        width = 30 if load == 0 else 1000 * load / longest
        bars[kind] += f"M0 {row * (i + 0.12):.1f}h{width:.1f}v{row * 0.76:.1f}h-{width:.1f}z"
    group = num_experts / rows
    y_labels = [
        Markup('<i class="y" style="top:{:.2f}%">{}</i>').format(100 * (i + 0.5) / rows, round(i * group))
        for i in range(0, rows, max(1, math.ceil(rows * 14 / height)))
    ]
    busiest, idle = int(final_E.argmax()), int(dead_E.sum())
    told = (
        f"load of {num_experts} experts over training; at the end {idle} of {rows} rows got nothing, and the busiest, "
    )
    told += f"from expert {round(busiest * group)}, took {final_E[busiest]:.2f} times its fair share"
    x0, x1 = x_range
    x_labels = [
        Markup('<i class="x" style="left:{:.2f}%">{}</i>').format(100 * (x - x0) / (x1 - x0), tick_text(x))
        for x in ticks(x0, x1, 4)
        if x0 <= x <= x1
    ]
    return Markup(
        '<div class="chart load"><div class="ylabel">expert</div><div class="pair">'
        '<div class="plot heat" style="height:{h}px" role="img" aria-label="{told}" '
        'data-x="step" data-range="{r}" data-rows="{rows}" data-columns="{c}" '
        'data-group="{g}" data-levels="{levels}"><img alt="" src="{png}">{y}{x}</div>'
        '<div class="plot bars" style="height:{h}px" role="img" aria-label="{told}" '
        'data-rows="{rows}" data-group="{g}" data-final="{final}" data-dead="{dead_rows}">'
        '<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true"><path class="barfair" d="{fair}"/>'
        '<path class="barover" d="{over}"/><path class="bardead" d="{dead}"/>'
        '<path class="fairline" d="M{one:.1f} 0V1000"/></svg>'
        '<i class="x" style="left:0">0</i><i class="x" style="left:{onepc:.1f}%">1×</i></div></div>'
        '<div class="xlabel two"><span>optimiser step</span><span>final load, × fair share</span></div></div>'
    ).format(
        h=height,
        told=told,
        r=json.dumps([x0, x1]),
        rows=rows,
        c=columns,
        g=round(group, 4),
        levels="".join(_ALPHABET[level] for level in level_EC.reshape(-1)),
        png=png(level_EC),
        y=Markup("").join(y_labels),
        x=Markup("").join(x_labels),
        final=json.dumps(short(final_E)),
        dead_rows="".join("1" if dead else "0" for dead in dead_E),
        fair=bars["fair"],
        over=bars["over"],
        dead=bars["dead"],
        one=1000 / longest,
        onepc=100 / longest,
    )


def png(level_EC: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> str:
    """A data URI of levels 0 … 60: red for 0 (nothing), blue below 30, clear at it, orange above."""
    rows, columns = level_EC.shape
    colors, alphas = bytearray((220, 38, 70)), bytearray((255,))
    for level in range(_LEVELS + 1):
        distance = level / (_LEVELS / 2) - 1
        colors += bytes((37, 105, 235) if distance < 0 else (234, 121, 8))
        alphas.append(round(255 * abs(distance) ** 0.85))
    body = b"".join(b"\0" + line.tobytes() for line in level_EC)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)
    parts = ((b"IHDR", header), (b"PLTE", bytes(colors)), (b"tRNS", bytes(alphas)), (b"IDAT", zlib.compress(body, 9)))
    image = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(image).decode()
