#!/usr/bin/env bash
# soundfile 0.14.0 (libsndfile 1.2.2): of a FLAC file whose STREAMINFO states no number of samples (valid,
# and what an encoder leaves that writes to a pipe), a read that takes the last sample raises
# "Internal psf_fseek() failed", and the object can no longer seek. `frames` is 2**63 - 1.
#
# Guess before: the read returns what there is, as for any file, or the file cannot be read at all.
#
# Seen: soundfile seeks to where every read ended, and that place cannot be sought when it is the end. The
# samples are decoded all the same: with `out=` they are in the array when the error comes. Damage and
# truncation have another code (158, not 39).
#
# Matters for every reader that takes such a corpus for damaged. Exits with 0 if this is still so, 1 if it
# has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check soundfile==0.14.0
cd "$folder"
cat > read.py <<'PYTHON'
import sys

import numpy as np
import soundfile

audio = (np.arange(5000) % 100 / 100).astype(np.float32)
soundfile.write("a.flac", audio, 16_000)
data = bytearray(open("a.flac", "rb").read())
data[21] &= 0xF0
data[22:26] = bytes(4)
open("a.flac", "wb").write(data)
sound = soundfile.SoundFile("a.flac")
print("frames", sound.frames, "without the last sample", len(sound.read(4999)))
sound, out = soundfile.SoundFile("a.flac"), np.full(6000, np.nan, np.float32)
try:
    sound.read(out=out)
    raised = None
except soundfile.LibsndfileError as error:
    raised = error
print("whole:", repr(raised), "decoded:", int(np.isfinite(out).sum()))
same = sound.frames == 2**63 - 1 and raised is not None and raised.code == 39
sys.exit(not (same and np.isfinite(out).sum() == 5000))
PYTHON
"$folder/venv/bin/python" read.py
