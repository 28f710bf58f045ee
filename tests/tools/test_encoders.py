from __future__ import annotations

import pytest

from lightning_mmgen.tools.main import main


def test_every_encoder_is_listed_with_its_weights_and_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["encoders"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [
        ["Idefics2Encoder", "HuggingFaceM4/idefics2-8b", "324"],
        ["LlavaEncoder", "llava-hf/llava-1.5-7b-hf", "576"],
        ["MllamaEncoder", "meta-llama/Llama-3.2-11B-Vision-Instruct", "1600"],
        ["Qwen25VLEncoder", "Qwen/Qwen2.5-VL-7B-Instruct", "324"],
    ]
