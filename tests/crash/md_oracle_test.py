#!/usr/bin/env python3
"""Arrays made here against an independent reader of md (tests/vectors/md/model.py) and, where installed, mdadm --examine.
usage: md_oracle_test.py MD_WRITER"""
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

MODEL = Path(__file__).resolve().parents[1] / "vectors/md/model.py"
ARRAYS = {  # name: sizes in MiB, options
    "r5ls": ([12] * 3, "--layer raid5"),
    "r5ra": ([12] * 4, "--layer raid5 --layout right-asymmetric --chunk 16384 --consistency resync"),
    "r5rs": ([12] * 3, "--layer raid5 --layout right-symmetric --consistency ppl"),
    "r5la": ([12] * 3, "--layer raid5 --layout left-asymmetric --fail m1.img"),
    "r5kill": ([12] * 3, "--layer raid5 --consistency ppl --kill"),
    "r1": ([12] * 2, "--layer mirror"),
    "r0": ([12, 16, 20], "--layer stripe"),
    "lin": ([12, 16, 20], "--layer linear"),
}


def main():
    with tempfile.TemporaryDirectory(prefix="spillway-oracle-") as folder:
        for name, (sizes, options) in ARRAYS.items():
            d = Path(folder, name)
            d.mkdir()
            files = [d / f"m{i}.img" for i in range(len(sizes))]
            for f, mib in zip(files, sizes):
                with open(f, "wb") as out:
                    out.truncate(mib << 20)
            out = subprocess.run([sys.argv[1], *files, *options.split()], check=True, capture_output=True, text=True)
            size, sha = out.stdout.split()
            (d / "array.size").write_text(size)
            (d / "array.sha256").write_text(sha)
            if shutil.which("mdadm"):
                said = subprocess.run(["mdadm", "--examine", files[0]], capture_output=True, text=True).stdout
                assert "- correct" in said, said
        said = subprocess.run([sys.executable, MODEL, *ARRAYS], cwd=folder, check=True, capture_output=True, text=True).stdout
        print(said)
        sys.exit(0 if said.count(" MATCH") == len(ARRAYS) and "NO MATCH" not in said else 1)


main()
