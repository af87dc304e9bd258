"""Fine-tuning data: only answers have a loss, rows hold whole conversations, and the order is a pure function."""

import errno
import json
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_models import TEMPLATES, chat_ids, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from data import token_count
from src.dataset import BinIdxWriter, sft_cache
from src.dataset.chat_template import ChatTemplate
from src.dataset.control_tokens import ContentMarks, special_token_pattern, split_at_control_tokens
from src.dataset.conversation_formats import Conversation, read_conversation
from src.dataset.conversations import render_with_answers
from src.dataset.encode_conversation import chat_tokenizer, encode_conversation
from src.dataset.packing import epoch_order, pack
from src.dataset.sft import IGNORED, SftDataset, SftRows, collate, collate_shares
from src.dataset.sft_cache import Conversations, look_at_conversations, open_conversations
from src.dataset.tokenizer import FolderTokenizer
from src.errors import UserError

IN_FOLDER = settings(max_examples=60)
DIFFICULT = [
    "<|im_start|>assistant\n",
    "<|im_end|>",
    "\n<|im_start|>user\n",
    "<|endoftext|>",
    "🙂",
    "世界",
    " ",
    "[[marker-0-",
]
CONTENT = st.lists(st.sampled_from(DIFFICULT) | st.text(st.characters(codec="utf-8"), max_size=8), max_size=4).map(
    "".join
)


@st.composite
def conversations_of_turns(draw: st.DrawFn) -> list[dict[str, str]]:
    turns = [{"role": "system", "content": draw(CONTENT)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns += [{"role": "user", "content": draw(CONTENT)}, {"role": "assistant", "content": draw(CONTENT)}]
    return turns


def to_line(turns: list[dict[str, str]]) -> bytes:
    return json.dumps({"conversations": turns}).encode()


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FolderTokenizer]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {name: chat_tokenizer(str(make_tokenizer(root / name, text))) for name, text in TEMPLATES.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def write(path: Path, lengths: list[int]) -> str:
    """One conversation per length, whose answer has its number and that many characters."""
    conversations = [
        [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i} " + "x" * length}]
        for i, length in enumerate(lengths)
    ]
    path.write_bytes(b"".join(to_line(turns) + b"\n" for turns in conversations))
    return str(path)


# Tokens with a loss


@IN_FOLDER
@given(turns=conversations_of_turns(), kind=st.sampled_from(sorted(TEMPLATES)))
def test_only_answers_and_their_end_tokens_have_a_loss(
    tokenizers: dict[str, FolderTokenizer], turns: list[dict[str, str]], kind: str
) -> None:
    tokenizer = tokenizers[kind]
    ids, counts, n_turns, *_ = encode_conversation(tokenizer, to_line(turns))
    plain = chat_ids(tokenizer, turns)
    assert tokenizer.decode(ids) == tokenizer.decode(plain), "the text is that of the plain rendering"
    if not any(token in turn["content"] for turn in turns for token in tokenizer.special_tokens):
        assert ids == plain
    harmless = chat_ids(tokenizer, [{**turn, "content": "x"} for turn in turns])
    special = {tokenizer.encode(token)[0] for token in tokenizer.special_tokens}
    assert [i for i in ids if i in special] == [i for i in harmless if i in special]
    assert n_turns == len(turns)
    counted = tokenizer.decode(np.array(ids)[counts].tolist())
    assert counted == "".join(turn["content"] + "<|im_end|>" for turn in turns if turn["role"] == "assistant")
    assert tokenizer.chat_template is not None
    text, answers, _ = render_with_answers(tokenizer.chat_template, tokenizer.special_tokens, Conversation(turns))
    for begin, _ in answers:
        assert text[:begin].endswith("<|im_start|>assistant\n"), "an answer begins after its header"


@pytest.mark.parametrize("names", [["<e>", "<e>|"], ["<e>|", "<e>"]])
@pytest.mark.parametrize("edit", ["{{ m.content }}", "{{ m.content | replace('q', 'Q') }}"], ids=["copied", "replaced"])
def test_one_special_token_a_prefix_of_another(names: list[str], edit: str) -> None:
    """The one that the template writes ends the answer, whole, in whichever order the tokenizer lists the two."""
    template = ChatTemplate("{% for m in messages %}<s>{{ m.role }}:" + edit + "<e>|\n{% endfor %}", {})
    turns = [{"role": "user", "content": "q?"}, {"role": "assistant", "content": "it is"}]
    text, answers, _ = render_with_answers(template, [*names, "<s>"], Conversation(turns))
    assert [text[begin:end] for begin, end in answers] == ["it is<e>|"]
    # As text in a content each is one mark, at its beginning: the longest there.
    marks = ContentMarks(names, ["a<e>|b<e>c"])
    plain, literals = marks.remove(marks.add("a<e>|b<e>c"))
    assert (plain, literals) == ("a<e>|b<e>c", {1, 6})
    pattern = special_token_pattern(names)
    assert pattern is not None
    assert [part for _, part, control in split_at_control_tokens("<e>|<e>", pattern, ()) if control] == ["<e>|", "<e>"]


def test_a_text_may_contain_the_signs_that_find_answers(tokenizers: dict[str, FolderTokenizer]) -> None:
    """A conversation about this code: whatever its numbers and private characters, others are taken."""
    signs = "".join(
        f"[[marker-{n}-{label}-{side}]]" for n in range(40) for label in (0, 1) for side in ("begin", "end")
    )
    private = "".join(map(chr, range(0xE000, 0xE010)))
    for content in (signs, signs[: len(signs) // 2], private, f"{private}<|im_end|>{signs}"):
        turns = [
            {"role": role, "content": f"{role} {content} {role}"} for role in ("user", "assistant", "user", "assistant")
        ]
        for tokenizer in tokenizers.values():
            ids, counts, *_ = encode_conversation(tokenizer, to_line(turns))
            expected = "".join(turn["content"] + "<|im_end|>" for turn in turns if turn["role"] == "assistant")
            assert tokenizer.decode(np.array(ids)[counts].tolist()) == expected


def test_world_answers_have_a_loss_including_their_final_blank_line() -> None:
    pytest.importorskip("pyrwkv_tokenizer")
    world = chat_tokenizer("world")
    turns = [
        {"role": "user", "content": "什么?\n\nreally"},
        {"role": "assistant", "content": "because 因为\n\nyes."},
        {"role": "user", "content": "and"},
        {"role": "assistant", "content": "🙂"},
    ]
    ids, counts, *_ = encode_conversation(world, to_line(turns))
    first = "User: 什么?\nreally\n\nAssistant: because 因为\n\nyes.\n\n"
    assert world.decode(ids) == first + "User: and\n\nAssistant: 🙂\n\n"
    assert world.decode(np.array(ids)[counts].tolist()) == " because 因为\n\nyes.\n\n 🙂\n\n"


def test_a_template_that_trims_answers_and_has_a_space_before_the_end_token(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role + ': ' + m.content | trim + ' <|im_end|>' }}{% endfor %}"
    tokenizer = chat_tokenizer(str(make_tokenizer(tmp_path, template)))
    turns = [{"role": "user", "content": "  q "}, {"role": "assistant", "content": "\n the answer  "}]
    ids, counts, *_ = encode_conversation(tokenizer, to_line(turns))
    assert tokenizer.decode(ids) == "user: q <|im_end|>assistant: the answer <|im_end|>"
    assert tokenizer.decode(np.array(ids)[counts].tolist()).strip() == "the answer <|im_end|>"


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (
            "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}",
            "not followed by a special token",
        ),
        ("{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}", "does not copy unchanged"),
        ("{{ messages[-1].content }}<|im_end|>", "does not copy unchanged"),
        ("{% generation %}{% endgeneration %}{% if false %}{% endif %}", "leaves out"),
        ("{% if false %}{% generation %}x{% endgeneration %}{% endif %}", "do not enclose the answers"),
        ("{{ raise_exception('never') }}", "never"),
        (None, "no chat template"),
    ],
)
def test_a_template_without_recognizable_answers_raises(tmp_path: Path, template: str | None, problem: str) -> None:
    make_tokenizer(tmp_path, template)
    with pytest.raises(UserError) as caught:
        chat_tokenizer(str(tmp_path))
    assert (caught.value.flag, caught.value.given) == ("tokenizer", str(tmp_path))
    assert problem in caught.value.problem
    assert template is None or "{% generation %}" in caught.value.advice


def test_missing_roles_alternate() -> None:
    read, *_ = read_conversation(b'{"conversations": [{"content": "a"}, {"content": "b"}, {"content": "c"}]}')
    assert [turn["role"] for turn in read] == ["user", "assistant", "user"]
    turns = [{"role": "system", "content": "s"}, {"content": "a"}, {"content": "b"}]
    read, *_ = read_conversation(json.dumps({"messages": turns}).encode())
    assert [turn["role"] for turn in read] == ["system", "user", "assistant"]


INVALID = {
    b"{": "invalid JSON",
    b"3": "a JSON value that is not an object",
    b"[]": "no answer",
    b'{"conversations": "x"}': "no list of turns in 'conversations'",
    b'{"conversations": []}': "no answer",
    b'{"conversations": [{"content": "x"}]}': "no answer",
    b'{"conversations": [{"role": "user"}]}': "a turn without text (its fields are role)",
    b'{"conversations": [{"role": "user", "content": 3}]}': "a turn without text (its content is of type int)",
    b'{"conversations": [3]}': "a turn that is not an object",
    b'{"conversations": [{"role": "narrator", "content": "x"}]}': "the role 'narrator'",
    b'{"conversations": [{"role": [3], "content": "x"}]}': "the role '[3]'",
    b'{"conversations": [{"content": "\\udc00"}, {"content": "x"}]}': "a lone surrogate",
    b'{"conversations": [{"content": "x"}, {"role": "system", "content": "x"}]}': "a system turn after the first turn",
    b'{"title": "x", "body": "y"}': "no conversation (the fields are title, body)",
}


@pytest.mark.parametrize("ending", [".txt", ".csv"])
def test_files_of_another_kind_raise_with_and_without_a_cache(tmp_path: Path, folder: str, ending: str) -> None:
    path = tmp_path / f"x{ending}"
    path.write_bytes(b"")
    for function in (open_conversations, look_at_conversations):
        with pytest.raises(UserError) as caught:
            function(str(path), folder)
        assert (caught.value.flag, caught.value.given) == ("data_file", str(path))
        assert ".jsonl" in caught.value.expected


def test_invalid_lines_are_counted_by_reason(tmp_path: Path, folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    good = to_line([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])
    (tmp_path / "x.jsonl").write_bytes(b"\n".join([good, *INVALID, good]))
    conversations = open_conversations(str(tmp_path / "x.jsonl"), folder)
    assert len(conversations.data) == 2
    reasons = list(INVALID.values())
    assert conversations.left_out == {reason: reasons.count(reason) for reason in reasons}
    assert "x.jsonl:2: invalid JSON" in capsys.readouterr().out
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(INVALID))
    for function in (open_conversations, look_at_conversations):
        with pytest.raises(UserError, match="no usable conversation") as caught:
            function(str(tmp_path / "x.jsonl"), folder)
        assert (caught.value.flag, caught.value.given) == ("data_file", str(tmp_path / "x.jsonl"))


@IN_FOLDER
@given(data=st.data())
def test_damaged_files_give_exactly_the_valid_lines(tmp_path: Path, folder: str, data: st.DataObject) -> None:
    content = bytearray(Path(write(tmp_path / "x.jsonl", [3, 5])).read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "x.jsonl").write_bytes(content)
    tokenizer = chat_tokenizer(folder)
    expected = []
    for line in bytes(content).removesuffix(b"\n").split(b"\n"):
        try:
            expected.append(encode_conversation(tokenizer, line).ids)
        except UserError:
            continue
    try:
        conversations = open_conversations(str(tmp_path / "x.jsonl"), folder, workers=1)
    except UserError:
        assert expected == []
    else:
        assert [conversations.read(i)[0].tolist() for i in range(len(conversations.data))] == expected


# The cache


def test_the_cache_is_used_until_an_input_changes(tmp_path: Path, tmp_path_factory: Any, folder: str) -> None:
    path = write(tmp_path / "x.jsonl", [5, 6])
    tokens = tmp_path / "x.jsonl.sft.bin"

    def opened(tokenizer: str = folder) -> tuple[Conversations, int]:
        conversations = open_conversations(path, tokenizer)
        return conversations, tokens.stat().st_ino

    first, inode = opened()
    second, unchanged = opened()
    assert unchanged == inode
    assert second.left_out == first.left_out
    assert (second.turns, second.answer_tokens) == (first.turns, first.answer_tokens) == (4, first.answer_tokens)
    write(tmp_path / "x.jsonl", [5, 6, 7])
    changed, other_inode = opened()
    assert len(changed.data) == 3
    assert other_inode != inode
    other = str(make_tokenizer(tmp_path_factory.mktemp("other"), TEMPLATES["user_opens"]))
    assert opened(other)[0].data[0].tolist() != changed.data[0].tolist()
    tokens.write_bytes(tokens.read_bytes()[:-4])
    assert len(opened(other)[0].data) == 3, "a truncated cache is rebuilt"


def test_a_file_that_changed_in_its_middle_is_another(tmp_path: Path) -> None:
    """Of equal size: its ends alone are hashed."""
    path, fingerprints = tmp_path / "x.jsonl", []
    for middle in (0, 1):
        content = bytearray(3 << 20)
        content[len(content) // 2] = middle
        path.write_bytes(content)
        os.utime(path, (1e9 + middle, 1e9 + middle))
        fingerprints.append(sft_cache._fingerprint(path))
    assert fingerprints[0] != fingerprints[1]


def test_a_cache_whose_replacement_was_cut_is_not_believed(
    tmp_path: Path, tmp_path_factory: Any, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the tokens by another tokenizer and their record; then the first one is used again."""
    path = write(tmp_path / "x.jsonl", [5, 6])
    ids = open_conversations(path, folder).data.tokens.tolist()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sft_cache, "atomic_write", killed)
        with pytest.raises(KeyboardInterrupt):
            open_conversations(path, str(make_tokenizer(tmp_path_factory.mktemp("other"), TEMPLATES["user_opens"])))
    assert open_conversations(path, folder).data.tokens.tolist() == ids


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record["made_from"].update(format=sft_cache._FORMAT - 1),
        lambda record: record["made_from"].update(format=sft_cache._FORMAT + 1),
        lambda record: record["made_from"].pop("format"),
        lambda record: record.pop("found"),
        lambda record: record["found"].update(turns=None),
        lambda record: record["found"].update(left_out=[]),
    ],
    ids=["older format", "newer format", "no format", "no counts", "wrong type", "wrong structure"],
)
def test_a_cache_of_another_format_is_rebuilt(tmp_path: Path, folder: str, change: Callable[[Any], Any]) -> None:
    path, record = write(tmp_path / "x.jsonl", [5, 6]), tmp_path / "x.jsonl.sft.json"
    built = open_conversations(path, folder)
    content, ids = json.loads(record.read_text()), [built.read(i)[0].tolist() for i in range(2)]
    changed = json.loads(record.read_text())
    change(changed)
    record.write_text(json.dumps(changed))
    # Other tokens under the name of the cache: they must not be believed.
    with BinIdxWriter(tmp_path / "x.jsonl.sft", np.int32) as out:
        out.add_document([1, 2, 3])
    rebuilt = open_conversations(path, folder)
    assert [rebuilt.read(i)[0].tolist() for i in range(len(rebuilt.data))] == ids
    assert json.loads(record.read_text()) == content


def test_a_cache_in_a_folder_without_write_permission(
    tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished cache is used; without one the error names the file."""
    path = write(tmp_path / "x.jsonl", [5, 6])
    built = open_conversations(path, folder)

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(sft_cache, "file_lock", read_only)
    assert open_conversations(path, folder).data[0].tolist() == built.data[0].tolist()
    (tmp_path / "x.jsonl.sft.json").unlink()
    with pytest.raises(UserError, match="Read-only file system") as caught:
        open_conversations(path, folder)
    assert (caught.value.flag, caught.value.given) == ("data_file", path)
    assert caught.value.advice


def test_the_number_of_workers_does_not_change_the_cache(
    tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("src.dataset.corpus.text_input.PIECE_BYTES", 500)
    path = write(tmp_path / "x.jsonl", list(range(60)))
    single = open_conversations(path, folder, workers=1)
    tokens = single.data.tokens.copy()
    os.utime(path, (1, 1))
    assert np.array_equal(open_conversations(path, folder, workers=3).data.tokens, tokens)


# Packing


@IN_FOLDER
@given(data=st.data(), capacity=st.integers(1, 40), seed=st.integers(0, 5))
def test_packing_places_each_conversation_once_within_the_capacity(
    data: st.DataObject, capacity: int, seed: int
) -> None:
    lengths = np.array(data.draw(st.lists(st.integers(1, capacity), max_size=60)), np.int64)
    rows = pack(lengths, capacity, seed)
    assert sorted(rows.members) == list(range(len(lengths)))
    sums = [int(lengths[rows.row(i)].sum()) for i in range(len(rows))]
    assert all(0 < total <= capacity for total in sums)
    assert len(rows) <= max(1, 2 * lengths.sum() / capacity), "no two rows are half empty"
    second = pack(lengths, capacity, seed)
    assert np.array_equal(rows.members, second.members)
    assert np.array_equal(rows.bounds, second.bounds)


@pytest.mark.parametrize(
    ("capacity", "median", "spread"),
    [(512, 60, 0.8), (512, 200, 0.7), (512, 300, 1.0), (1024, 300, 0.7), (2048, 450, 0.5), (2048, 800, 0.8)],
)
def test_packing_fills_rows_for_typical_length_distributions(capacity: int, median: float, spread: float) -> None:
    sampled = np.random.default_rng(0).lognormal(np.log(median), spread, 20_000)
    lengths = np.clip(sampled.astype(np.int64), 1, capacity)
    rows = pack(lengths, capacity, 0)
    assert lengths.sum() / (len(rows) * capacity) > 0.95


def test_packing_depends_on_its_seed() -> None:
    """Conversations of one length share rows with others under another seed, and with the same under the same."""
    lengths = np.full(60, 5)

    def rows(seed: int) -> set[frozenset[int]]:
        packing = pack(lengths, 10, seed)
        return {frozenset(packing.row(i).tolist()) for i in range(len(packing))}

    assert rows(1) == rows(1)
    assert rows(1) != rows(2)
    assert epoch_order(50, 1, 0).tolist() != epoch_order(50, 2, 0).tolist()


@pytest.mark.parametrize("lengths", [[7, 3], [7, 6, 4, 3], [10, 9, 1], [5, 5, 5, 5], [4, 3, 3], [8, 8, 1, 1, 1, 1]])
def test_a_conversation_that_fits_exactly_fills_its_row(lengths: list[int]) -> None:
    packing = pack(np.array(lengths), 10, seed=0)
    sums = [sum(lengths[i] for i in packing.row(row)) for row in range(len(packing))]
    assert sums == [10] * (sum(lengths) // 10)


@pytest.mark.parametrize("answer_at", [7, 8, 9])
def test_the_only_counted_token_at_the_end_of_the_context(answer_at: int) -> None:
    """The last of ctx_len targets is token number ctx_len: a conversation that is cut there keeps its answer."""
    ctx_len, n_tokens = 8, 12
    counts = np.zeros(n_tokens, np.bool_)
    counts[answer_at] = True

    class Data(list[Any]):
        sizes = np.array([n_tokens])
        tokens = np.where(counts, np.arange(n_tokens), -1 - np.arange(n_tokens))

        def read(self, begin: int, end: int) -> Any:
            return self.tokens[begin:end]

    class OneConversation:
        data, media = Data([Data.tokens]), None

        def read(self, index: int) -> tuple[Any, Any]:
            return np.arange(n_tokens), counts

    if answer_at > ctx_len:
        with pytest.raises(UserError, match="no conversation has an answer"):
            SftRows(OneConversation(), ctx_len)  # type: ignore[arg-type]
        return
    rows = SftRows(OneConversation(), ctx_len)  # type: ignore[arg-type]
    targets = rows.row(0).targets
    assert (targets != IGNORED).nonzero().flatten().tolist() == [answer_at - 1]
    assert targets[answer_at - 1] == answer_at
    assert rows.target_counts.tolist() == [1]
    assert (rows.n_cut, rows.n_dropped) == (1, 0)


def test_epochs_are_different_permutations() -> None:
    orders = [epoch_order(1000, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(1000)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


# Rows and samples


@pytest.fixture
def conversations(tmp_path: Path, folder: str) -> Conversations:
    lengths = np.random.default_rng(1).integers(0, 50, 40).tolist()
    return open_conversations(write(tmp_path / "x.jsonl", lengths), folder)


def inputs_and_targets(conversations: Conversations) -> list[tuple[list[int], list[int]]]:
    """Inputs and targets of each conversation without packing."""
    read = [conversations.read(i) for i in range(len(conversations.data))]
    return [(ids[:-1].tolist(), np.where(counts, ids, IGNORED)[1:].tolist()) for ids, counts in read]


def test_rows_hold_every_conversation_completely(conversations: Conversations) -> None:
    rows = SftRows(conversations, 128)
    unpacked = []
    for number in range(len(rows)):
        inputs, targets, bounds = rows.row(number)[:3]
        assert bounds.tolist() == sorted(set(bounds.tolist()))
        assert (bounds[0], bounds[-1], bounds.dtype) == (0, 128, torch.int32)
        for begin, end in pairwise(bounds):
            if (inputs[begin:end] == 0).all():  # padding
                assert (targets[begin:end] == IGNORED).all()
                assert end == 128
            else:
                unpacked.append((inputs[begin:end].tolist(), targets[begin:end].tolist()))
    expected = inputs_and_targets(conversations)
    assert sorted(unpacked) == sorted(expected)
    assert rows.filled == pytest.approx(sum(len(inputs) for inputs, _ in expected) / (128 * len(rows)))
    assert len(rows) < len(expected) / 2


def test_without_packing_each_conversation_has_a_row(conversations: Conversations) -> None:
    rows = SftRows(conversations, 128, packing=False)
    assert len(rows) == len(conversations.data)
    for number, (inputs, targets) in enumerate(inputs_and_targets(conversations)):
        padding = 128 - len(inputs)
        row = rows.row(number)
        assert row.inputs.tolist() == inputs + [0] * padding
        assert row.targets.tolist() == targets + [IGNORED] * padding
        assert row.cu_seqlens.tolist() == [0, 128]


def test_ranks_and_restarts_read_the_same_rows(conversations: Conversations) -> None:
    rows = SftRows(conversations, 128, seed=3)
    total = 3 * len(rows)
    single = [row.inputs.tolist() for row, _ in SftDataset(rows, 0, total, 0, 1)]
    for epoch in range(3):
        in_epoch = single[epoch * len(rows) : (epoch + 1) * len(rows)]
        assert sorted(in_epoch) == sorted(rows.row(i).inputs.tolist() for i in range(len(rows)))
    assert single[: len(rows)] != single[len(rows) : 2 * len(rows)]
    start = 5
    ranks = [SftDataset(rows, start, (total - start) // 2, rank, 2) for rank in range(2)]
    together = [row.inputs.tolist() for pair in zip(*ranks, strict=True) for row, _ in pair]
    assert together == single[start : start + len(together)]
    with pytest.raises(IndexError):
        ranks[0][len(ranks[0])]


def test_a_batch_is_a_single_row_with_concatenated_bounds(conversations: Conversations) -> None:
    rows = SftRows(conversations, 128)
    one, two = rows.sample(0), rows.sample(1)
    loader = DataLoader(SftDataset(rows, 0, 2, 0, 1, micro_bsz=2), batch_size=2, collate_fn=collate_shares)
    inputs, targets, cu_seqlens, weight = next(iter(loader))
    assert inputs.tolist() == [one.inputs.tolist() + two.inputs.tolist()]
    assert targets.tolist() == [one.targets.tolist() + two.targets.tolist()]
    assert cu_seqlens.tolist() == one.cu_seqlens.tolist() + [128 + end for end in two.cu_seqlens.tolist()[1:]]
    assert cu_seqlens.dtype == torch.int32
    assert weight == 1


@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 1)])
def test_a_step_is_the_mean_over_its_targets_for_any_ranks_and_micro_batches(
    conversations: Conversations, ranks: int, micro_batches: int
) -> None:
    """For a loss that depends on the targets, with skipped samples and a restart."""
    rows = SftRows(conversations, 64, seed=1)
    batch, first, skipped_samples, steps = 8, 5, [(7, 2)], 3
    micro_bsz = batch // (ranks * micro_batches)
    numbers = [n for n in range(first, first + steps * batch + 2) if n not in (7, 8)]

    def loss(targets: torch.Tensor) -> torch.Tensor:
        counted = targets[targets != IGNORED].double()
        return (counted * 0.37).sin().sum() / max(1, len(counted))

    sets = [
        SftDataset(rows, first, steps * batch // ranks, rank, ranks, skipped_samples, micro_bsz, micro_batches)
        for rank in range(ranks)
    ]
    loaders = [iter(DataLoader(each, batch_size=micro_bsz, collate_fn=collate_shares)) for each in sets]
    for step in range(steps):
        whole = torch.cat([rows.sample(n).targets for n in numbers[step * batch : (step + 1) * batch]])
        shares = [next(loader) for loader in loaders for _ in range(micro_batches)]
        mean = torch.stack([loss(targets) * weight for _, targets, _, weight in shares]).mean()
        torch.testing.assert_close(mean, loss(whole), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"packing": False}, {"truncate": "drop"}, {"count_all": True}], ids=str)
@pytest.mark.parametrize(("ctx_len", "block"), [(64, 1), (64, 500), (40, 500), (64, 1 << 22)])
def test_targets_are_counted_without_building_rows(
    conversations: Conversations, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], ctx_len: int, block: int
) -> None:
    monkeypatch.setattr("src.dataset.sft._COUNTED_TOKENS", block)
    rows = SftRows(conversations, ctx_len, **settings)
    counted = [int((rows.row(number).targets != IGNORED).sum()) for number in range(len(rows))]
    assert rows.target_counts.tolist() == counted
    built = []
    build = SftRows.row
    monkeypatch.setattr(SftRows, "row", lambda self, number: built.append(number) or build(self, number))
    share = SftDataset(rows, 3, 4, rank=1, world_size=4, micro_bsz=2, micro_batches=2)
    _, mean = share[0]
    assert mean == sum(counted[rows.packed_row(n)] for n in range(3, 3 + 16)) / 8
    assert len(built) == 1, "the other rows of the step are not built"


def test_long_conversations_are_truncated_dropped_or_errors(tmp_path: Path, folder: str) -> None:
    conversations = open_conversations(write(tmp_path / "x.jsonl", [4, 500, 4, 600]), folder)
    cut = SftRows(conversations, 128)
    assert (cut.n_cut, cut.n_dropped) == (2, 0)
    longest = [cut.row(i) for i in range(len(cut)) if len(cut.row(i).cu_seqlens) == 2]
    assert len(longest) == 2
    assert all(row.targets[-1] != IGNORED for row in longest)
    dropped = SftRows(conversations, 128, truncate="drop")
    assert (dropped.n_cut, dropped.n_dropped, len(dropped)) == (0, 2, 1)
    with pytest.raises(UserError, match="2 of 4 conversations are longer; the first is number 1") as caught:
        SftRows(conversations, 128, truncate="error")
    assert (caught.value.flag, caught.value.given) == ("ctx_len", 128)
    header = len(conversations.read(0)[0]) - 1 - int(conversations.read(0)[1].sum())
    with pytest.raises(UserError, match="no conversation has an answer") as caught:
        SftRows(conversations, header - 8)
    assert (caught.value.flag, caught.value.given) == ("ctx_len", header - 8)


def test_count_all_gives_every_position_a_target(conversations: Conversations) -> None:
    rows = SftRows(conversations, 128, packing=False, count_all=True)
    for number in range(len(rows)):
        inputs, targets, _ = rows.row(number)[:3]
        assert torch.equal(targets[:-1], inputs[1:])
        assert targets[-1] == 0
    short = SftRows(conversations, 16, packing=False, count_all=True)
    assert len(short) == len(conversations.data), "none is dropped for a missing answer"
    assert torch.equal(short.row(3).targets[:-1], short.row(3).inputs[1:])


def test_loss_and_gradients_of_a_packed_row_are_weighted_means(conversations: Conversations) -> None:
    from src.model import RWKV7, ModelConfig
    from src.ops.loss import cross_entropy_l2wrap

    torch.manual_seed(0)
    model = RWKV7(ModelConfig(n_layer=2, n_embd=32, head_size=16, vocab_size=512, kernel="reference")).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))

    def loss_and_gradients(inputs: torch.Tensor, targets: torch.Tensor, bounds: torch.Tensor | None) -> Any:
        model.zero_grad()
        loss = cross_entropy_l2wrap(model(inputs, cu_seqlens=bounds)[0], targets)
        loss.backward()
        return loss.detach(), [p.grad.clone() if p.grad is not None else None for p in model.parameters()]

    batch = collate([SftRows(conversations, 64).row(0), SftRows(conversations, 64).row(1)])
    packed, packed_gradients = loss_and_gradients(*batch[:3])
    mean, total = torch.zeros((), dtype=packed.dtype), int((batch.targets != IGNORED).sum())
    means = [torch.zeros_like(p) for p in model.parameters()]
    bounds = batch.cu_seqlens.tolist()
    for begin, end in pairwise(bounds):
        targets = batch.targets[:, begin:end]
        weight = int((targets != IGNORED).sum()) / total
        if weight:
            loss, gradients = loss_and_gradients(batch.inputs[:, begin:end], targets, None)
            mean += weight * loss
            for sum_, gradient in zip(means, gradients, strict=True):
                if gradient is not None:
                    sum_ += weight * gradient
    torch.testing.assert_close(packed, mean, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(packed_gradients, means, strict=True):
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_token_count_prints_counts_and_a_preview(
    tmp_path: Path, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "x.jsonl", [4, 40, 4, 300])
    token_count.main([path, "128", "--tokenizer", folder, "--preview", "1"])
    output = capsys.readouterr().out
    conversations = open_conversations(path, folder)
    lines = output.splitlines()
    assert "conversations   4 (lines left out: none)" in lines
    assert "turns           8, 2.00 per conversation" in lines
    assert f"tokens          {conversations.data.n_tokens}, mean" in output
    assert "longer than 128  1, 25.0 %" in output
    rows = SftRows(conversations, 128)
    assert output.endswith(f"--my_exit_tokens {128 * len(rows)} --ctx_len 128\n")
    assert f"{token_count.ANSWER_COLOR}1 {'x' * 40}<|im_end|>{token_count.RESET}" in output
    with pytest.raises(SystemExit):
        token_count.main([path, "128", "--tokenizer", folder, "--preview", "4"])
    assert "--preview 4: expected a conversation from 0 to 3" in capsys.readouterr().err
