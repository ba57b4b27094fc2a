"""A checkpoint gives the same hidden states here, in transformers and through torchaudio."""

from pathlib import Path

import pytest
import soundfile
import torch
from torchaudio.models.wav2vec2.utils import import_huggingface_model
from transformers import Wav2Vec2ForPreTraining

from ssl_core.training import checkpoint
from ssl_core.training import hf_checkpoint as hf
from ssl_core.wav2vec2.config import preset
from ssl_core.wav2vec2.model import PretrainingModel


@pytest.mark.slow
@pytest.mark.parametrize("name", ["base", "tiny"])
def test_hidden_states_of_a_real_utterance_agree(
    name: str, librispeech: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = PretrainingModel(preset(name))
    place = tmp_path / "round-00001"
    checkpoint.save(place, model.config, model.state_dict(), state={"next_round": 1})
    ours = hf.load_model(place).eval()
    theirs, info = Wav2Vec2ForPreTraining.from_pretrained(place, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    imported = import_huggingface_model(theirs.wav2vec2).eval()
    file = sorted((librispeech / "train-clean-100" / "19").rglob("*.flac"))[0]
    samples, rate = soundfile.read(file, dtype="float32")
    assert rate == 16_000
    waveform = torch.from_numpy(samples)[None]
    with torch.inference_mode():
        found = ours.wav2vec2(waveform)
        transformers_states = theirs.eval().wav2vec2(waveform).last_hidden_state
        torchaudio_states = imported.extract_features(waveform)[0][-1]
    for states in (transformers_states, torchaudio_states):
        assert states.shape == found.shape
        assert float((found - states).norm() / states.norm()) < 1e-5
