"""A random LLaVA-1.5 of a few thousand parameters in the layout of the Hugging Face hub, for tests."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ eos_token if message['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CORPUS = [
    "USER: ASSISTANT: is there a nodule in the left lung? yes, there is a small nodule in the left lung.",
    "no, the right lung is clear. what does this image show? a large effusion on the right.",
    "brain mr with an infarct in the left hemisphere. abdominal ultrasound with a stone. which organ?",
]


def build_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<image>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )


def build(folder: Path, *, seed: int = 0, image_size: int = 32, patch_size: int = 8, width: int = 32) -> Path:
    """Write the model to `folder` and return it. 16 visual tokens, two layers, four heads.

    vLLM on a CPU needs heads of 32 or more: a `width` of 128.
    """
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    shape = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**shape, image_size=image_size, patch_size=patch_size),
        text_config=LlamaConfig(
            **shape,
            num_key_value_heads=2,
            vocab_size=len(tokenizer),
            max_position_embeddings=512,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            initializer_range=0.3,
        ),
        image_token_id=3,
        image_seq_length=(image_size // patch_size) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    save_model(LlavaForConditionalGeneration(config), folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
        ),
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return folder


def save_model(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """As transformers 4 saved it and vLLM reads it: transformers 5 leaves `vision_model` out of the names."""
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    tower = "vision_tower."
    named = {name.replace(tower, f"{tower}vision_model."): tensor for name, tensor in weights.items()}
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})


def picture(seed: int, size: int = 40) -> Image.Image:
    """Noise: an image that differs from every other."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8))
