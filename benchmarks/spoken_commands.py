"""Speaks a small corpus in Timers and Such's layout with the demo voices.

`python -m benchmarks.spoken_commands FOLDER [TIMES]`; TIMES multiplies the number of voices.
"""

import csv
import sys
from pathlib import Path
from random import Random

import numpy as np
import soundfile
import soxr

from partitions.demo_corpus import voices_of
from partitions.espeak import Espeak
from partitions.sampling import SAMPLE_RATE

NUMBERS = {
    2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine",
    10: "ten", 12: "twelve",
}  # fmt: skip
UNITS = ("minutes", "hours", "seconds")
PARTS = {"train-real": 3, "train-synth": 3, "dev-real": 1, "test-real": 1}
"""Voices of each part; no voice speaks in two parts."""
COMMANDS = 6
"""Commands of each voice."""


def command_of(random: Random) -> tuple[str, dict[str, object]]:
    """A random command and its semantics."""
    if random.random() < 0.5:
        number, unit = random.choice(list(NUMBERS)), random.choice(UNITS)
        text = f"set a timer for {NUMBERS[number]} {unit}"
        return text, {"intent": "SetTimer", "slots": {unit: number}}
    first, second = random.sample(list(NUMBERS), 2)
    text = f"what is {NUMBERS[first]} plus {NUMBERS[second]}"
    slots = {"number1": first, "number2": second, "op": "plus"}
    return text, {"intent": "SimpleMath", "slots": slots}


def main(folder: Path, times: int = 1) -> None:
    """Speak all commands into `folder` and write its tables, with `times` as many voices."""
    parts = {part: times * count for part, count in PARTS.items()}
    voices = iter(voices_of(sum(parts.values())))
    with Espeak() as espeak:
        for part, count in parts.items():
            (folder / part).mkdir(parents=True)
            with open(folder / f"{part}.csv", "w", encoding="utf-8", newline="") as stream:
                table = csv.writer(stream)
                table.writerow(["path", "speakerId", "transcription", "semantics"])
                for _ in range(count):
                    voice = next(voices)
                    random = Random(voice.speaker)
                    espeak.choose(voice)
                    for number in range(COMMANDS):
                        text, semantics = command_of(random)
                        clean = espeak.say(text).astype(np.float32) / 32768
                        speech = soxr.resample(clean, espeak.rate, SAMPLE_RATE)
                        path = f"{part}/{voice.speaker}-{number}.wav"
                        soundfile.write(folder / path, speech, SAMPLE_RATE, subtype="PCM_16")
                        table.writerow([path, voice.speaker, text, str(semantics)])


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
