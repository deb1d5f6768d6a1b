"""Text in and out: token ids, chats and streams as transformers has them, and stop strings against a plain oracle."""

import json
import random
import time
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import decoders, models

from nanoserve import GPT, LLM, Detokenizer, ModelConfig, Place, SamplingParams, Tokenizer

torch.set_num_threads(1)
DATA = Path(__file__).parent / "data" / "tokenizers"
REFERENCE = json.loads((DATA / "reference.json").read_text(encoding="utf-8"))
KINDS = list(REFERENCE)  # byte_level, metaspace, prepend
TEXTS = [(kind, case) for kind in KINDS for case in REFERENCE[kind]["texts"]]
CHATS = [(kind, case) for kind in KINDS for case in REFERENCE[kind]["chats"]]
HOLE = "\ufffd"  # the replacement character
TOKENIZERS = {kind: Tokenizer(DATA / kind) for kind in KINDS}


def named(value) -> str | None:
    """A readable test id for the cases of reference.json."""
    return value if isinstance(value, str) else repr(value.get("text") or value.get("error"))[:24]


def copied(tmp_path: Path, kind: str, **config) -> Tokenizer:
    """A tokenizer folder with keys of its tokenizer_config.json replaced."""
    old = json.loads((DATA / kind / "tokenizer_config.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer.json").write_bytes((DATA / kind / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**old, **config}), encoding="utf-8")
    return Tokenizer(tmp_path)


# ---- ids ----


@pytest.mark.parametrize("kind, case", TEXTS, ids=named)
def test_ids_and_text_are_those_of_transformers(kind, case):
    tokenizer = TOKENIZERS[kind]
    assert tokenizer.encode(case["text"]) == case["ids"]
    assert tokenizer.encode(case["text"], add_special_tokens=False) == case["ids_without_special"]
    assert tokenizer.decode(case["ids"]) == case["decoded"]
    assert tokenizer.decode(case["ids"], skip_special_tokens=False) == case["decoded_with_special"]


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_is_no_unicode_is_a_value_error(kind):
    """Python makes such halves of pairs of bytes of a command line or a file's name that are no UTF-8."""
    for text in ("\udcff", "one \ud83e two"):
        with pytest.raises(ValueError, match="^prompt: is not valid Unicode"):
            TOKENIZERS[kind].encode(text)


@pytest.mark.parametrize("kind", KINDS)
def test_the_vocabulary_counts_added_tokens(kind):
    assert TOKENIZERS[kind].vocab_size == REFERENCE[kind]["vocab_size"]
    for name in ("bos_token", "eos_token"):
        token = TOKENIZERS[kind].special[name]
        assert token == REFERENCE[kind][name]
        assert TOKENIZERS[kind].encode(token, add_special_tokens=False) == [REFERENCE[kind][name + "_id"]]


def test_truncation_and_padding_stored_with_a_tokenizer_are_off(tmp_path):
    """Both are left over from training in some tokenizer.json; a prompt must neither be cut nor filled up."""
    backend = tokenizers.Tokenizer.from_file(str(DATA / "byte_level" / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=100)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "Hello, world! the token and the model"
    assert Tokenizer(tmp_path).encode(text) == TOKENIZERS["byte_level"].encode(text)


# ---- chats ----


@pytest.mark.parametrize("kind, case", CHATS, ids=named)
def test_chats_are_rendered_as_transformers_does(kind, case, monkeypatch):
    tokenizer, now = TOKENIZERS[kind], time.strptime(REFERENCE[kind]["now"], "%Y-%m-%dT%H:%M:%S")
    strftime = time.strftime
    monkeypatch.setattr(time, "strftime", lambda form: strftime(form, now))
    if "error" in case:
        with pytest.raises(ValueError, match="^chat: .*" + case["error"]) as caught:
            tokenizer.render_chat(case["messages"], case["add_generation_prompt"])
        assert "\n" not in str(caught.value)
        return
    assert tokenizer.render_chat(case["messages"], case["add_generation_prompt"]) == case["text"]
    # The template wrote BOS itself: tokenizing its text must not put another in front.
    ids = tokenizer.apply_chat_template(case["messages"], case["add_generation_prompt"])
    bos = REFERENCE[kind]["bos_token_id"]
    assert ids == tokenizer.encode(case["text"], add_special_tokens=False)
    assert ids[0] == bos and ids[1] != bos and ids.count(bos) == case["text"].count(REFERENCE[kind]["bos_token"])


def test_add_generation_prompt_is_on_by_default():
    assert TOKENIZERS["byte_level"].render_chat([{"role": "user", "content": "Hi"}]).endswith("assistant\n\n")


ATTACKS = ["{{ ''.__class__ }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ cycler.__init__.__globals__ }}",
           "{{ raise_exception.__globals__ }}", "{{ messages.append(messages) }}", "{{ messages[0].update(role='x') }}",
           "{{ messages.clear() }}", "{{ ''['__cla' + 'ss__'].__base__ }}", "{{ messages[0].pop('role') }}"]


@pytest.mark.parametrize("template", ATTACKS)
def test_templates_are_in_a_sandbox(template, tmp_path):
    """A checkpoint comes from anywhere, and its template is a program."""
    tokenizer, messages = copied(tmp_path, "byte_level", chat_template=template), [{"role": "user", "content": "Hi"}]
    try:
        assert tokenizer.render_chat(messages) == ""  # some escapes are simply undefined
    except ValueError as error:
        assert str(error).startswith("chat: ")
    assert messages == [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize("template", ATTACKS[1:3] + ATTACKS[4:7])
def test_the_sandbox_says_what_it_refuses(template, tmp_path):
    with pytest.raises(ValueError, match="unsafe"):
        copied(tmp_path, "byte_level", chat_template=template).render_chat([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize("template", [
    "{% if %}", "{{ messages[0].content + 1 }}", "{{ 1 / 0 }}", "{% for i in range(10 ** 9) %}{% endfor %}",
    "{{ messages[0].content | nofilter }}", "{% include 'other' %}", "{{ nothing.at.all }}",
    "{% for m in 5 %}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ raise_exception('one\ntwo') }}",
])
def test_whatever_goes_wrong_in_a_template_is_one_line(template, tmp_path):
    tokenizer = copied(tmp_path, "byte_level", chat_template=template)
    with pytest.raises(ValueError, match="^chat: ") as caught:
        tokenizer.render_chat([{"role": "user", "content": "Hi"}])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("template, text", [
    ("{% for m in messages %}\n  {% if m %}\nx\n  {% endif %}\n{% endfor %}", "x\n"),  # trim_blocks, lstrip_blocks
    ("{% for m in [1, 2, 3] %}{{ m }}{% if m == 2 %}{% break %}{% endif %}{% endfor %}", "12"),
    ("{{ messages | tojson }}", '[{"role": "user", "content": "é<&>"}]'),
    ("{{ {'b': 1, 'a': 'é'} | tojson(indent=1) }}", '{\n "b": 1,\n "a": "é"\n}'),
    ("{{ {'b': 1, 'a': 'é'} | tojson(ensure_ascii=True, sort_keys=True) }}", '{"a": "\\u00e9", "b": 1}'),
    ("{{ {'b': 1} | tojson(separators=(',', ':')) }}", '{"b":1}'),
    ("{{ tools is none }} {{ documents is none }}", "True True"),  # transformers always passes both
    ("{{ bos_token }}{{ eos_token }}{{ pad_token }}", "<|begin_of_text|><|end_of_turn|>"),
    ("{{ color }}{{ add_generation_prompt }}", "redTrue"),
])
def test_templates_get_what_transformers_gives_them(template, text, tmp_path):
    tokenizer = copied(tmp_path, "byte_level", chat_template=template)
    assert tokenizer.render_chat([{"role": "user", "content": "é<&>"}], color="red") == text


def test_where_a_template_may_be(tmp_path):
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert copied(tmp_path, "byte_level", chat_template=named).render_chat([]) == "D"
    for absent in (None, named[:1], ["default"], [{"name": "default"}]):
        with pytest.raises(ValueError, match="no chat template"):
            copied(tmp_path, "byte_level", chat_template=absent).render_chat([])
    (tmp_path / "chat_template.jinja").write_text("é from the file", encoding="utf-8")
    assert copied(tmp_path, "byte_level", chat_template="from the config").render_chat([]) == "é from the file"


# ---- streams ----


def stream(tokenizer: Tokenizer, ids: list[int], prompt: list[int] = (), stop: tuple = ()) -> tuple[str, list[str]]:
    """The text at the end, and after each token; along the way it may only grow."""
    reader, texts = Detokenizer(tokenizer, list(prompt), stop), [""]
    for token in ids:
        reader.push(token)
        texts.append(reader.text)
    reader.finish()
    texts.append(reader.text)
    assert all(later.startswith(earlier) for earlier, later in zip(texts, texts[1:]))
    reader.finish()
    assert reader.text == texts[-1]  # a second time changes nothing
    return texts[-1], texts[1:-1]


def bytes_of(kind: str, data: bytes) -> list[int]:
    """The tokens that stand for single bytes."""
    backend = TOKENIZERS[kind].backend
    if kind != "byte_level":
        return [backend.token_to_id(f"<0x{byte:02X}>") for byte in data]
    # GPT-2 writes bytes as characters: itself where that prints, else the next free one from 256 on.
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = sorted(set(range(256)) - shown)
    return [backend.token_to_id(chr(byte if byte in shown else 256 + hidden.index(byte))) for byte in data]


@pytest.mark.parametrize("kind, case", TEXTS, ids=named)
def test_token_by_token_is_the_whole_text(kind, case):
    """After each token exactly the characters that it completed: what transformers decodes up to there, if whole."""
    for prompt in ([], case["ids"][:1]):
        ids = case["ids"][len(prompt):]
        text, texts = stream(TOKENIZERS[kind], ids, prompt)
        assert text == case["decoded"]
        assert not any(HOLE in text for text in texts)
        for text, prefix in zip(texts, case["prefixes"][len(prompt):]):
            if HOLE not in prefix:
                assert text == prefix


@pytest.mark.parametrize("kind, case", TEXTS, ids=named)
def test_output_continues_the_prompt(kind, case):
    """Cut a text anywhere between two characters, call the first part the prompt: together they are the text again.

    Decoding by itself drops the first space of a text, so it has to begin inside the prompt; and where it begins must
    not be inside a character, or with byte tokens everything next to it is holes.
    """
    for cut in range(1, len(case["ids"])):
        before = case["prefixes"][cut - 1]
        if not before.endswith(HOLE):
            text, texts = stream(TOKENIZERS[kind], case["ids"][cut:], case["ids"][:cut])
            assert before + text == case["decoded"], cut
            assert not any(HOLE in text for text in texts)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_that_ends_inside_a_character(kind):
    """The output completes it and so shows it; what came before it is not said a second time."""
    head, smile = TOKENIZERS[kind].encode("so the token"), bytes_of(kind, "🙂".encode())
    for cut in (1, 2, 3):
        text, _ = stream(TOKENIZERS[kind], smile[cut:] + bytes_of(kind, b"ok"), head + smile[:cut])
        assert text == "🙂ok", cut


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_prompt_of_byte_tokens(kind):
    """Each character here takes three or four tokens, so a tail of fixed length begins inside one sooner or later."""
    space = TOKENIZERS[kind].encode("the the", add_special_tokens=False)[-1:]  # " the"
    for n in range(1, 9):
        for text in ("한국語"[:n % 4] + "字" * n, "字" + "🙂" * n, "é" * n + "字"):
            assert stream(TOKENIZERS[kind], space, bytes_of(kind, text.encode()))[0] == " the", text


def test_the_first_space_is_kept():
    for kind in KINDS:
        tokenizer = TOKENIZERS[kind]
        ids = tokenizer.encode("the token and", add_special_tokens=False)
        assert tokenizer.decode(ids[1:]) in ("token and", " token and")
        assert stream(tokenizer, ids[1:], ids[:1])[0] == " token and"
        # Without a prompt to tell, or right behind BOS, sentence-piece decoders take a first space for their own.
        first = " token and" if kind == "byte_level" else "token and"
        assert stream(tokenizer, ids[1:])[0] == first
        assert stream(tokenizer, ids[1:], [REFERENCE[kind]["bos_token_id"]])[0] == first


@pytest.mark.parametrize("kind", KINDS)
def test_characters_over_several_tokens(kind):
    """Nothing is shown of a character before its last byte, and then all of it at once."""
    for text in ("é", "字", "🙂", "👩‍👧"):
        ids = bytes_of(kind, text.encode())
        whole, texts = stream(TOKENIZERS[kind], ids)
        assert whole == text
        assert texts == [text.encode()[:n].decode(errors="ignore") for n in range(1, len(ids) + 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_half_a_character_at_the_end(kind):
    """It waits for its other half until nothing more comes; then it is one hole, or one for each of its bytes."""
    for data in (b"ab\xc3", b"ab\xe5\xad", b"\xf0\x9f\x99"):
        start, half = data.rstrip(b"\xc3\xe5\xad\xf0\x9f\x99").decode(), len(data.lstrip(b"ab"))
        text, texts = stream(TOKENIZERS[kind], bytes_of(kind, data))
        if kind == "byte_level":
            assert text == start + HOLE and texts[-1] == start
        else:  # byte tokens are one run: with a broken character at its end all of it could be
            assert text == start + HOLE * half and not any(HOLE in text for text in texts)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_that_are_no_character(kind):
    """Text goes on behind them. Whatever was shown before stays, though decoding all at once would take it back."""
    word = TOKENIZERS[kind].encode("the the", add_special_tokens=False)[-1:]
    for junk in (b"\xff", b"\x80\x80", b"\xf0\x9f", b"\xc3\xff\xfe"):
        text, texts = stream(TOKENIZERS[kind], bytes_of(kind, "aé".encode() + junk) + word + word)
        assert text.startswith("aé" + HOLE) and text.endswith(HOLE + " the the")
        assert texts[2] == "aé" and texts[-2].endswith(HOLE + " the")
        assert set(text[2:-8]) == {HOLE} and 1 <= len(text) - 10 <= len(junk)


@pytest.mark.parametrize("kind", KINDS)
def test_random_tokens(kind):
    """Any tokens at all, half of them single bytes: the text is that of decoding everything at once.

    In a run of byte tokens that is not UTF-8 everything is a hole, even what was shown long ago (see above); there the
    letters of the whole decoding must be among those shown.
    """
    rng, tokenizer = random.Random(0), TOKENIZERS[kind]
    singles = bytes_of(kind, bytes(range(256)))
    for _ in range(300):
        ids = [rng.choice(singles) if rng.random() < 0.5 else rng.randrange(tokenizer.vocab_size)
               for _ in range(rng.randint(1, 25))]
        text, _ = stream(tokenizer, ids)
        whole = tokenizer.decode(ids)
        if kind == "byte_level" or HOLE not in whole:
            assert text == whole, ids
        else:
            shown = iter(text)
            assert all(letter in shown for letter in whole if letter != HOLE), ids


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_show_nothing(kind):
    tokenizer, ref = TOKENIZERS[kind], REFERENCE[kind]
    ids = tokenizer.encode("so the token", add_special_tokens=False)
    special = [ref["eos_token_id"], ref["bos_token_id"]]
    text, texts = stream(tokenizer, ids[:2] + special + ids[2:] + special, [ref["bos_token_id"]])
    assert text == "so the token" and texts[-1] == text and texts[1] == texts[3]
    assert stream(tokenizer, special * 3)[0] == ""


# ---- stop strings ----

ALPHABET = "abcé🙂 "


def letters(pieces: list[str]) -> Tokenizer:
    """A tokenizer whose token i is pieces[i]."""
    tokenizer = Tokenizer.__new__(Tokenizer)
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer.backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token=pieces[0]))
    tokenizer.backend.decoder = decoders.Fuse()
    return tokenizer


def expected(pieces: list[str], stop: tuple, first: int = 0) -> tuple[str, int | None]:
    """The text before the earliest stop string at the moment that one completes, and after how many tokens that is.

    A stop string counts if it completes with token `first` or later.
    """
    text = ""
    for n, piece in enumerate(pieces, 1):
        before, text = len(text), text + piece
        ends = {at: stop for stop in stop for at in range(len(text))
                if text.startswith(stop, at) and at + len(stop) > before}
        if ends and n > first:
            return text[: min(ends)], n
    return text, None


def run(tokenizer: Tokenizer, ids: list[int], stop: tuple, first: int = 0) -> tuple[str, int | None]:
    """The detokenizer's answer, asked as the engine does. Nothing may be shown that does not stay."""
    reader, shown = Detokenizer(tokenizer, [], stop), []
    for n, token in enumerate(ids, 1):
        reader.push(token, may_stop=n > first)
        shown.append(reader.text)
        if reader.stopped:
            break
    stopped = n if reader.stopped else None
    reader.finish()
    assert all(reader.text.startswith(text) for text in shown)
    return reader.text, stopped


@pytest.mark.parametrize("pieces, stop, text, after", [
    (["one", " two", " end", " more"], ("end",), "one two ", 3),  # begins inside a token
    (["one", "ST", "OP", "on"], ("STOP",), "one", 3),  # spans tokens
    (["a", "S", "T", "O", "P", "b"], ("STOP",), "a", 5),
    (["a", "xSTOPy", "b"], ("STOP",), "ax", 2),  # lies inside a token
    (["a", "b", "c"], ("c",), "ab", 3),  # at the very end
    (["STOP"], ("STOP",), "", 1),
    (["a", "ST", "Oa", "b"], ("STOP",), "aSTOab", None),  # begins and does not come
    (["a", "ST"], ("STOP",), "aST", None),  # the end comes first: what was held back is text after all
    (["x", "bb aa"], ("aa", "bb"), "x", 2),  # the earliest, not the first in the list
    (["x", "abc"], ("bc", "abc"), "x", 2),  # both at once
    (["ab", "c"], ("abc", "b"), "a", 1),  # whichever completes first
    (["a", "a", "a", "b"], ("aab",), "a", 4),  # a match that begins inside a failed one
    (["ab", "ab", "ac"], ("abac",), "ab", 3),
    (["ti🙂", "c"], ("🙂c",), "ti", 2),
    (["ab", "cd"], (), "abcd", None),
])
def test_stop_strings(pieces, stop, text, after):
    vocab = sorted(set(pieces))
    assert expected(pieces, stop) == (text, after)  # the oracle of the fuzz below agrees
    assert run(letters(vocab), [vocab.index(piece) for piece in pieces], stop) == (text, after)


def test_stop_strings_over_halves_of_characters():
    for kind in KINDS:
        ids = bytes_of(kind, "okéx🙂!".encode())
        assert run(TOKENIZERS[kind], ids, ("éx🙂",)) == ("ok", 9)
        assert run(TOKENIZERS[kind], ids, ("x",)) == ("oké", 5)


def test_only_as_much_as_could_be_a_stop_string_is_held_back():
    """Streaming lags by at most the longest stop string less one, and without any not at all."""
    pieces = list("the cat sat on the mat")
    vocab = sorted(set(pieces))
    ids = [vocab.index(piece) for piece in pieces]
    for stop in ((), ("z",), ("zz", "xyz")):
        lag = max(map(len, stop), default=1) - 1
        _, texts = stream(letters(vocab), ids, stop=stop)
        assert all(n - lag <= len(text) <= n for n, text in enumerate(texts, 1))


@pytest.mark.parametrize("min_tokens", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_random_stop_strings(seed, min_tokens):
    """Against the oracle, over an alphabet so small that candidates overlap all the time.

    With min_tokens, a stop string that was complete before is text, and stays so.
    """
    rng, stopped = random.Random(seed), 0
    for _ in range(250):
        alphabet = ALPHABET[: rng.randint(2, len(ALPHABET))]
        vocab = sorted({"".join(rng.choices(alphabet, k=rng.choice((1, 1, 1, 2, 3)))) for _ in range(8)})
        ids = rng.choices(range(len(vocab)), k=rng.randint(1, 20))
        stop = tuple("".join(rng.choices(alphabet, k=rng.randint(1, 5))) for _ in range(rng.randint(1, 3)))
        first = rng.randint(1, 10) if min_tokens else 0
        want = expected([vocab[i] for i in ids], stop, first)
        assert run(letters(vocab), ids, stop, first) == want, (ids, vocab, stop, first)
        stopped += want[1] is not None
    assert 40 < stopped < 230  # both ends of the story are told


# ---- through the engine ----


def byte_engine(text: str) -> LLM:
    """An LLM over the byte-level tokenizer whose greedy output after one token is `text`: a model that only counts.

    Learned positions are all it looks at: position i says token i of the text.
    """
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode(text, add_special_tokens=False)
    size, vocab = len(ids) + 1, tokenizer.vocab_size
    config = ModelConfig("gpt2", vocab, size, 1, 1, 1, size, size, size, 1e-5, None, [0], False, qkv_bias=True,
                         o_bias=True, mlp_bias=True)
    model = GPT(config, torch.float32, torch.device("cpu")).randomize(std=0.0)
    model.position_embed.copy_(torch.eye(size))
    head = torch.zeros(vocab, size)
    head[ids, range(len(ids))] = 1.0
    model.set(Place(None, "head", (vocab, size), 0, vocab), head)
    llm = LLM(model, max_batch_requests=2)
    llm.tokenizer = tokenizer
    return llm


@pytest.mark.parametrize("stop, text, reason", [
    ([], "the end. Über 🙂 more", "length"), ("end", "the ", "stop"), (["🙂", "more"], "the end. Über ", "stop"),
    (["nowhere"], "the end. Über 🙂 more", "length"), ("more", "the end. Über 🙂 ", "stop"), (["the"], "", "stop"),
])
def test_generate_and_stream_agree_on_stop_strings(stop, text, reason):
    llm = byte_engine("the end. Über 🙂 more")
    size = len(llm.tokenizer.encode("the end. Über 🙂 more", add_special_tokens=False))
    params = SamplingParams(temperature=0, max_tokens=size, stop=stop)
    prompt = [llm.tokenizer.encode("x")[-1]]  # position 0 says the text's first token
    out = llm.generate([prompt], params)[0]
    assert (out.text, out.finish_reason) == (text, reason)
    pieces = list(llm.stream(prompt, params))
    assert "".join(pieces) == text and all(pieces)
    assert llm.stats()["blocks_used"] == 0
    if reason == "stop":  # ends with the token that completed it, not later
        assert text + (stop if isinstance(stop, str) else stop[0]) in llm.tokenizer.decode(out.token_ids)
        assert llm.tokenizer.decode(out.token_ids[:-1]).count(stop if isinstance(stop, str) else stop[0]) == 0


def test_min_tokens_delays_stop_strings():
    llm = byte_engine("the end, the very end")
    prompt = [llm.tokenizer.encode("x")[-1]]
    ids = llm.tokenizer.encode("the end, the very end", add_special_tokens=False)
    first = next(n for n in range(len(ids)) if "end" in llm.tokenizer.decode(ids[:n]))
    for min_tokens, text in ((0, "the "), (first, "the "), (first + 1, "the end, the very ")):
        params = SamplingParams(temperature=0, max_tokens=len(ids), min_tokens=min_tokens, stop="end")
        out = llm.generate([prompt], params)[0]
        assert (out.text, out.finish_reason) == (text, "stop"), min_tokens
