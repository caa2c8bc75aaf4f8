"""One step of GRPOTrainer with environments: a tiny model on the CPU, whose responses are scripted."""

from __future__ import annotations

import tempfile
from functools import partial
from typing import Any

import torch
from checks import check
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl.chat_template_utils import qwen3_chat_template

from rock.integrations.trl import LABELS, CodingEnvironment
from rock.sync import Sandbox

CALL = '<tool_call>\n{"name": "run", "arguments": {"command": "echo 42 > /tmp/answer; cat /tmp/answer"}}\n</tool_call>'
torch.set_num_threads(1)


def tokenizer() -> Any:
    """Bytes and the special tokens of the template."""
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *special]
    found = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=found, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   additional_special_tokens=["<|im_start|>"])  # fmt: skip
    made.chat_template = qwen3_chat_template
    return made


WORDS = tokenizer()


class Scripted(Qwen2ForCausalLM):  # type: ignore[misc]
    """Every second rollout calls the tool; after its result each ends."""

    seen: list[str] = []

    def generate(self, input_ids: Any, **_: Any) -> Any:
        texts = []
        for number, row in enumerate(input_ids):
            prompt = WORDS.decode(row)
            Scripted.seen.append(prompt)
            texts.append(f"{CALL if number % 2 == 0 and '<tool_response>' not in prompt else 'done'}<|im_end|>")
        rows = [WORDS(text, add_special_tokens=False)["input_ids"] for text in texts]
        width = max(map(len, rows))
        padded = torch.tensor([row + [WORDS.pad_token_id] * (width - len(row)) for row in rows])
        return torch.cat([input_ids, padded], dim=1)


with check("a step of GRPOTrainer: the tools run in sandboxes, and the environments give the rewards"):
    config = Qwen2Config(vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32768)  # fmt: skip
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "Write 42 to /tmp/answer."}]}] * 2)
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=Scripted(config), processing_class=WORDS, train_dataset=rows,
            args=GRPOConfig(output_dir=folder, max_steps=1, per_device_train_batch_size=2, num_generations=2,
                            max_completion_length=512, report_to=[], use_cpu=True, logging_steps=1, save_strategy="no",
                            disable_tqdm=True),
            environment_factory=partial(CodingEnvironment, "host", reward="grep -q 42 /tmp/answer", memory="512m"),
        )  # fmt: skip
        trainer.train()
        logged = [line for line in trainer.state.log_history if "reward" in line]
    assert logged and logged[0]["reward"] == 0.5, trainer.state.log_history  # of two rollouts
    assert any("<tool_response>\n42" in prompt for prompt in Scripted.seen), Scripted.seen[-1][-500:]
    assert Sandbox.list(states="running", labels=LABELS) == []
