"""Tokenizers read what lies beside a checkpoint, as the reference does, or say what is missing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flexpipe.errors import InputError, ModelError
from flexpipe.job.tokenizer import ByteTokenizer, Tokenizer

TEXTS = ["the cat sat", "a dog!", "the the cat"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint's directory with a small fast tokenizer that puts <s> before a prompt."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    specials = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(TEXTS, trainer)
    fast.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    directory = tmp_path_factory.mktemp("checkpoint")
    fast.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": 4,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def test_ids_and_texts_are_those_of_the_reference(directory: Path) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(str(directory))
    tokenizer = Tokenizer.open(directory, 300)
    assert tokenizer.encode_batch(TEXTS) == reference(TEXTS)["input_ids"]
    assert tokenizer.encode(TEXTS[0]) == reference(TEXTS[0])["input_ids"]
    assert tokenizer.encode(TEXTS[0])[0] == 0
    assert tokenizer.encode_batch([]) == []
    assert tokenizer.eos_token_ids == (1,)


def test_decoding_drops_special_tokens(directory: Path) -> None:
    tokenizer = Tokenizer.open(directory, 300)
    assert tokenizer.decode([*tokenizer.encode("a dog!"), 1]) == "a dog!"


def test_plain_fast_tokenizer_needs_no_torch(directory: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\n"
        "from flexpipe.job.tokenizer import Tokenizer\n"
        f"Tokenizer.open(Path({str(directory)!r}), 300)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_tokenizer_of_another_model_is_found_out(directory: Path) -> None:
    with pytest.raises(ModelError, match="do not belong together"):
        Tokenizer.open(directory, 10).encode("the cat")


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"looked for tokenizer\.json, tokenizer\.model"):
        Tokenizer.open(tmp_path, 300)


def test_broken_file_is_a_model_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=f"cannot read the tokenizer in {tmp_path}"):
        Tokenizer.open(tmp_path, 300)


def test_bytes_stand_in_for_a_dummy_model(tmp_path: Path) -> None:
    for missing in (None, tmp_path):
        tokenizer = Tokenizer.open(missing, 1000, bytes_if_missing=True)
        assert tokenizer.decode(tokenizer.encode("né")) == "né"
        assert tokenizer.eos_token_ids == ()
    small = ByteTokenizer(50)
    assert all(id < 50 for id in small.encode("hello"))
    assert isinstance(ByteTokenizer(152064).decode([150000, 300]), str)


CHAT = [{"role": "system", "content": "the cat"}, {"role": "user", "content": "a <s> né"}]
TEMPLATE = """<s>{% for message in messages %}
{%- if message.role == "robot" %}{{ raise_exception("no robots") }}{% endif %}
{{- message.role }}: {{ message.content }}
{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""


@pytest.fixture(scope="module")
def chat_directory(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    chat = tmp_path_factory.mktemp("chat") / "checkpoint"
    shutil.copytree(directory, chat)
    (chat / "chat_template.jinja").write_text(TEMPLATE)
    return chat


def test_messages_go_through_the_reference_s_template(chat_directory: Path) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(str(chat_directory))
    ids = Tokenizer.open(chat_directory, 300).encode_messages(CHAT)
    assert ids == reference.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert ids[0] == 0 and ids[1] != 0  # the template's <s> is the only one in front
    assert reference.decode(ids).endswith("assistant:")


def test_what_a_template_refuses_is_told(chat_directory: Path) -> None:
    robot = [{"role": "robot", "content": "x"}]
    with pytest.raises(InputError, match="chat template refuses these messages: no robots"):
        Tokenizer.open(chat_directory, 300).encode_messages(robot)


def test_model_without_a_template_takes_no_messages(directory: Path) -> None:
    for tokenizer in (Tokenizer.open(directory, 300), ByteTokenizer(300)):
        with pytest.raises(InputError, match="no chat template; give prompt"):
            tokenizer.encode_messages(CHAT)


@pytest.mark.parametrize("messages", [[], "hello", [{"role": "user"}], [{"content": "x"}]])
def test_misshapen_messages_are_refused(chat_directory: Path, messages: Any) -> None:
    with pytest.raises(InputError, match="messages"):
        Tokenizer.open(chat_directory, 300).encode_messages(messages)
