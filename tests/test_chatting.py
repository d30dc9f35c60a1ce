"""`limbeck chat`: the template's own words, an end, and a context that is full at some time."""

import io
import json
import re

import pytest

import limbeck
import tiny_language
from limbeck import chatting
from limbeck.cli import main
from limbeck.errors import DataError
from limbeck.generating import Sampling, generate

TOKENIZER = tiny_language.tokenizer()


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return tiny_language.save(tmp_path_factory.mktemp("student") / "hf").parent


def rendered(*contents: str) -> list[int]:
    """The prompt of a conversation whose turns are these, a system message first."""
    roles = ["system", *["user", "assistant"] * len(contents)]
    messages = [
        {"role": role, "content": said} for role, said in zip(roles, contents, strict=False)
    ]
    text = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def answer(prompt: list[int], tokens: int) -> str:
    sampling = Sampling(max_new_tokens=tokens, sampling_temperature=0)
    (said,) = generate(tiny_language.model(), [prompt], sampling, ends=(2,)).tokens
    return TOKENIZER.decode([t for t in said.tolist() if t != 2], skip_special_tokens=True)


def test_each_answer_follows_from_the_whole_conversation(student):
    chat = limbeck.chat_with(student, system="sea", max_new_tokens=12)
    first = "".join(chat.say("the old man"))
    assert first == answer(rendered("sea", "the old man"), 12)
    second = "".join(chat.say("and the sea"))
    assert second == answer(rendered("sea", "the old man", first, "and the sea"), 12)
    assert [m["role"] for m in chat.messages] == ["system", *["user", "assistant"] * 2]
    assert chat.note == "cut at 12 tokens"


def test_the_oldest_turns_are_forgotten_and_it_says_so(student):
    chat = limbeck.chat_with(student, system="sea", max_new_tokens=20)
    said = [("old man", "".join(chat.say("old man")))]
    while not (chat.note or "").startswith("the first"):
        assert len(said) < 9
        said.append(("theology", "".join(chat.say("theology"))))
    assert re.match(r"the first \d messages are forgotten: the context is full; cut", chat.note)
    lost = int(chat.note.split()[2])
    kept = [text for pair in said for text in pair][lost:-1]
    prompt = rendered("sea", *kept)
    assert len(prompt) + 20 <= 128 < len(rendered("sea", *said[0][:lost], *kept)) + 20
    assert said[-1][1] == answer(prompt, 20)
    assert chat.messages[0]["role"] == "system", "that is never forgotten"


def test_an_answer_ends_where_the_student_ends_it(student, monkeypatch):
    chat = limbeck.chat_with(student, max_new_tokens=12)
    ids = chat.encoder.prompt([{"role": "user", "content": "sea"}])
    sampling = Sampling(max_new_tokens=12, sampling_temperature=0)
    (free,) = generate(chat.model, [ids], sampling, ends=()).tokens
    monkeypatch.setattr(chatting, "end_ids", lambda model: (int(free[4]),))
    first = free.tolist().index(int(free[4]))
    assert "".join(chat.say("sea")) == TOKENIZER.decode(free[:first], skip_special_tokens=True)
    assert chat.note is None


def test_on_the_command_line_it_talks_until_exit(student, monkeypatch, capsys):
    lines = "the old man\n\n" + "xyz " * 90 + "\nthe sea\n/exit\nnever\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert main(["chat", str(student), "--max-new-tokens", "5"]) == 0
    said, wrong = capsys.readouterr()
    assert said.count("(cut at 5 tokens)") == 2, "the second is refused, and it goes on"
    assert wrong.startswith("limbeck: your message: ") and "128 in all" in wrong
    roles = [{"role": "user", "content": "the old man"}]
    first = answer(limbeck.chat_with(student).encoder.prompt(roles), 5)
    assert said.startswith(first + "\n(cut at 5 tokens)")
    monkeypatch.setattr("sys.stdin", io.StringIO("the sea"))
    assert main(["chat", str(student), "--max-new-tokens", "5", "--temperature", "2"]) == 0


def test_what_cannot_talk_is_refused(student, tmp_path, refused, capsys):
    plain = tiny_language.save(tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    assert "no chat template; allowed: a chat_template; let it go on" in refused("chat", plain)
    picky = tiny_language.save(tmp_path / "picky")
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    (picky / "chat_template.jinja").write_text(refuses + tiny_language.TEMPLATE)
    assert "--system: the chat template refuses it: no system" in refused(
        "chat", picky, "--system", "sea"
    )
    with pytest.raises(DataError, match="no system"):
        limbeck.chat_with(picky, system="sea")
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaModel"]}))
    assert "does not continue text" in refused("chat", plain)
    assert "no student there" in refused("chat", tmp_path / "nowhere")
    for option, value in (("--max-new-tokens", "0"), ("--temperature", "-1")):
        with pytest.raises(SystemExit):
            main(["chat", str(student), option, value])
        assert f"{value!r}; allowed: a" in capsys.readouterr().err
