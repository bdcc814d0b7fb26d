#!/usr/bin/env python3
"""Draws `bench_raid --sim --json FILE` as a PNG (standard library only): plot.py FILE.json OUT.png"""
import json
import struct
import sys
import zlib

FONT = {  # 3x5, rows top to bottom, three bits each
    "0": "757 5 5 5 7", "1": "262227", "2": "71747", "3": "71717", "4": "55711", "5": "74717", "6": "74757", "7": "71111",
    "8": "75757", "9": "75717", " ": "00000", "/": "11244", "-": "00700", ".": "00002", "M": "57755", "B": "65656",
    "I": "72227", "O": "75557", "P": "75744", "S": "74717", "T": "72222", "R": "65655", "E": "74747", "A": "75755",
    "L": "44447", "N": "57775", "s": "03426"[0:5], "K": "55655", "D": "65556", "F": "74744", "C": "74447", "U": "55557", "Q": "75573",
}
FONT["0"], FONT["1"] = "75557", "26227"
WIDTH, HEIGHT = 960, 420


class Canvas:
    def __init__(self):
        self.rows = [bytearray(b"\xff" * WIDTH * 3) for _ in range(HEIGHT)]

    def dot(self, x, y, color, size=1):
        for j in range(size):
            for i in range(size):
                if 0 <= x + i < WIDTH and 0 <= y + j < HEIGHT:
                    self.rows[y + j][3 * (x + i):3 * (x + i) + 3] = bytes(color)

    def line(self, a, b, color, size=1):
        n = max(abs(b[0] - a[0]), abs(b[1] - a[1]), 1)
        for k in range(n + 1):
            self.dot(a[0] + (b[0] - a[0]) * k // n, a[1] + (b[1] - a[1]) * k // n, color, size)

    def text(self, x, y, words, color=(0, 0, 0)):
        for c in words.upper():
            for j, bits in enumerate(FONT.get(c, FONT[" "])):
                for i in range(3):
                    if int(bits) >> (2 - i) & 1:
                        self.dot(x + 2 * i, y + 2 * j, color, 2)
            x += 8

    def save(self, path):
        def chunk(kind, data):
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        raw = b"".join(b"\0" + bytes(r) for r in self.rows)
        with open(path, "wb") as f:
            f.write(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 2, 0, 0, 0)) +
                    chunk(b"IDAT", zlib.compress(raw, 9)) + chunk(b"IEND", b""))


def panel(canvas, left, title, runs, key):
    x0, x1, y0, y1 = left + 60, left + 450, 370, 50
    top = max(max(r[f"stripe_{key}"], r[f"linear_{key}"]) for r in runs) * 1.1
    canvas.text(x0, 20, title)
    canvas.line((x0, y0), (x1, y0), (0, 0, 0))
    canvas.line((x0, y0), (x0, y1), (0, 0, 0))
    for k in range(5):
        y = y0 - (y0 - y1) * k // 4
        canvas.line((x0 - 4, y), (x1, y), (200, 200, 200) if k else (0, 0, 0))
        canvas.text(left, y - 5, f"{top * k / 4:6.0f}")
    for name, color in (("stripe", (200, 40, 40)), ("linear", (40, 80, 200))):
        points = [(x0 + (x1 - x0) * i // (len(runs) - 1), int(y0 - (y0 - y1) * r[f"{name}_{key}"] / top))
                  for i, r in enumerate(runs)]
        for a, b in zip(points, points[1:]):
            canvas.line(a, b, color, 2)
        canvas.text(x0 + 240, 20 if name == "stripe" else 34, name, color)
    for i, r in enumerate(runs):
        canvas.text(x0 + (x1 - x0) * i // (len(runs) - 1) - 8, y0 + 10, str(r["streams"]))
    canvas.text(x0 + 130, y0 + 28, "streams")


def main():
    runs = [r for r in json.load(open(sys.argv[1]))["runs"] if "streams" in r]
    canvas = Canvas()
    panel(canvas, 10, "sequential MB/s", runs, "mb_s")
    panel(canvas, 490, "random 4K IOPS", runs, "iops")
    canvas.save(sys.argv[2])


main()
