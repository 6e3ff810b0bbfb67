"""From a text to its token ids: what transformers' tokenizer gives, without transformers, at the speed of its backend.

Where a text spells the name of the end-of-text token, a document ends and another begins, whatever the tokenizer would
make of the name; and one that begins with the name of the BOS, where the tokenizer adds one, does not get a second.

A long text is cut into pieces that overlap, so that its encoding (some 150 bytes a token) is never in memory as a
whole. No tokenizer promises a place where a text may be cut: a merge, a run of spaces or a normalization may reach
over any. But a piece is only wrong near its ends. So two neighbours are joined inside their overlap, at a token before
and after which both say the same, ids, characters and words; and where they do not, they overlap by more.

That is enough. What splits a text into words reads it from the left, so from one common beginning of a word on it goes
on alike. Inside a word, merges are settled by which tokens may stand side by side, so two rows of tokens that share
one can be joined at it; other models (Unigram weighs a word as a whole) are joined between words alone.
"""

from __future__ import annotations

import json
import unicodedata
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from llama_pro_fast.digests import file_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BATCH_CHARACTERS = 2**16
"""Text for each thread of the tokenizer at once: small enough that its memory stays in the cache, which is faster."""
LONG_CHARACTERS = 2**22
"""Longer texts are encoded in pieces."""
PIECE_CHARACTERS = 2**16
"""Of which each has so many: to tell where a token stands takes more time per character in a long text."""
OVERLAP_CHARACTERS = 2**10
"""That neighbouring pieces share at first."""
BEGINNING_CHARACTERS = 256
"""Of a text, whose first token is nearly always the whole text's."""
AGREEING_TOKENS = 16
"""On either side of the token at which two pieces are joined."""
LOOK_BACK_TOKENS = 64
"""From where a piece might begin, for the beginning of a word."""


@dataclass(frozen=True)
class EncoderSettings:
    """All that token ids depend on beside the text.

    Attributes:
        tokenizer: a tokenizer.json's content, without truncation and padding.
        bos, eos: names of the tokens; None where the tokenizer has none.
        eos_id: the id of ``eos``.
        special_tokens_are_text: whether the names of control tokens that stand in a text are only text.
    """

    tokenizer: str
    bos: str | None
    eos: str | None
    eos_id: int | None
    special_tokens_are_text: bool

    @cached_property
    def key(self) -> str:
        """Equal keys mean equal tokens."""
        return file_hash(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast, special_tokens: str) -> EncoderSettings:
        """Those of a fast tokenizer of transformers.

        Args:
            special_tokens: ``text`` or ``tokens``, as ``data.special_tokens``.
        """
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state |= {"truncation": None, "padding": None}  # leftovers of the last call, and no part of ours
        return cls(
            tokenizer=json.dumps(state, sort_keys=True),
            bos=tokenizer.bos_token,
            eos=tokenizer.eos_token,
            eos_id=tokenizer.eos_token_id,
            special_tokens_are_text=special_tokens == "text" or bool(tokenizer.split_special_tokens),
        )


class Encoder:
    """Gives documents their token ids.

    Args:
        threads: of the tokenizer, which takes them from its own pool (``RAYON_NUM_THREADS``).

    Attributes:
        largest_id: of its tokens; a vocabulary may have holes.
    """

    def __init__(self, settings: EncoderSettings, threads: int = 1) -> None:
        self._tokenizer = Tokenizer.from_str(settings.tokenizer)
        self._tokenizer.encode_special_tokens = settings.special_tokens_are_text
        self._batch_characters = BATCH_CHARACTERS * threads
        vocabulary = self._tokenizer.get_vocab()
        self.largest_id = max(vocabulary.values(), default=0)
        self._merges = json.loads(settings.tokenizer)["model"]["type"] == "BPE"
        self._eos, self._eos_id = settings.eos, settings.eos_id
        self._before, self._after = _added(self._tokenizer, vocabulary)
        self._tokenizer.post_processor = None  # it would copy every text's tokens to put these around them
        has_bos = settings.bos is not None and self._tokenizer.token_to_id(settings.bos) in self._before
        self._bos = settings.bos if has_bos else None

    def documents(self, text: str) -> list[tuple[str, int]]:
        """The documents that a row of a source holds, and where in it each begins: none where it is blank, more where
        it spells the EOS's name."""
        if not text or text.isspace():
            return []
        has_bos = self._bos is not None and self._bos in text
        if not has_bos and (self._eos is None or self._eos not in text):
            return [(text, 0)]
        found, begin = [], 0
        for piece in text.split(self._eos) if self._eos else [text]:
            document = piece
            while has_bos and document.startswith(self._bos):
                document = document[len(self._bos) :]
            if document and not document.isspace():
                found.append((document, begin + len(piece) - len(document)))
            begin += len(piece) + len(self._eos or "")
        return found

    def encode(
        self, texts: Sequence[str], *, measured: bool = False, done: Callable[[int], Any] = lambda _: None
    ) -> Iterator[tuple[Sequence[int], int]]:
        """The ids of each text, the EOS last; and, where it is measured, the UTF-8 bytes of it after its first token.

        Where the tokenizer adds a BOS, these are all its bytes. A first token that ends inside a character
        (byte-level tokenizers split rare ones) is taken to end with it, so up to 3 bytes are missing there. There are
        no ids where the tokenizer makes nothing of a text, and -1 bytes where it is not measured.

        Args:
            done: called now and then with the number of characters done since.
        """
        begin = 0
        while begin < len(texts):
            end, characters = begin, 0
            while end < len(texts) and characters < self._batch_characters and len(texts[end]) <= LONG_CHARACTERS:
                characters += len(texts[end]) + 100  # so that many tiny texts make a batch too
                end += 1
            if end == begin:
                yield self._encode_long(texts[begin], measured, done)
                end += 1
            else:
                batch = texts[begin:end]
                # The fast one leaves out where in the text a token stands.
                for text, encoding in zip(batch, self._tokenizer.encode_batch_fast(batch), strict=True):
                    ids = encoding.ids
                    num_bytes = self._bytes_after_first(text, ids) if measured else -1
                    ids[:0] = self._before
                    ids += self._after
                    yield self._ended(ids), num_bytes
                done(sum(map(len, batch)))
            begin = end

    def _bytes_after_first(self, text: str, ids: list[int]) -> int:
        if self._before:
            return len(text.encode())
        if not ids:
            return -1
        for some in (text[:BEGINNING_CHARACTERS], text):
            (encoding,) = self._tokenizer.encode_batch([some])
            if encoding.ids[:1] == ids[:1]:
                break
        return _bytes_after_first(text, encoding) if encoding.ids else len(text.encode())

    def _ended(self, ids: Any) -> Any:
        if ids and self._eos_id is not None and ids[-1] != self._eos_id:
            ids.append(self._eos_id)
        return ids

    def _encode_long(self, text: str, measured: bool, done: Callable[[int], Any]) -> tuple[array[int], int]:
        num_bytes, ids = -1, array("I", self._before)
        for first, last, piece in self._pieces(text, done):
            if first == 0:  # the text's beginning; a second time where the pieces came to nothing
                ids = array("I", self._before)
                if measured:
                    num_bytes = len(text.encode()) if self._before else _bytes_after_first(text, piece.encoding)
            ids.fromlist(piece.ids[first:last])
        ids.fromlist(self._after)
        return self._ended(ids), num_bytes

    def _pieces(self, text: str, done: Callable[[int], Any]) -> Iterator[tuple[int, int, _Piece]]:
        """(first, last, piece): the ranges of the pieces' tokens that are the text's, in order.

        Where a model weighs a word as a whole that is longer than a piece, the whole text comes after all.
        """
        piece, first = self._piece(text, 0, PIECE_CHARACTERS), 0
        done(piece.end)
        while piece.end < len(text):
            end, overlap = min(piece.end + PIECE_CHARACTERS, len(text)), OVERLAP_CHARACTERS
            while True:
                following = self._piece(text, piece.place_to_begin(piece.end - overlap), end)
                if joint := piece.joint(following, first, inside_words=self._merges):
                    break
                if following.begin == piece.begin:
                    whole = self._piece(text, 0, len(text))
                    done(len(text) - piece.end)
                    yield 0, len(whole.ids), whole
                    return
                overlap *= 4
            yield first, joint[0], piece
            done(end - piece.end)
            piece, first = following, joint[1]
        yield first, len(piece.ids), piece

    def _piece(self, text: str, begin: int, end: int) -> _Piece:
        (encoding,) = self._tokenizer.encode_batch([text[begin:end]])
        return _Piece(text, begin, min(end, len(text)), encoding)


class _Piece:
    """The tokens of characters [begin, end) of a text."""

    def __init__(self, text: str, begin: int, end: int, encoding: Any) -> None:
        self._text = text
        self.begin, self.end, self.encoding = begin, end, encoding
        self.ids: list[int] = encoding.ids

    def place_to_begin(self, place: int) -> int:
        """Where a piece should begin that overlaps from about ``place`` on: with a word, or at least with a token."""
        number = min(self._first_from(place), len(self.ids) - 1)
        if place <= self.begin or number <= 0:
            return self.begin
        for earlier in range(number, max(0, number - LOOK_BACK_TOKENS), -1):
            if self._begins_word(earlier):
                return self._start(earlier)
        return self._start(number)

    def joint(self, following: _Piece, first: int, *, inside_words: bool) -> tuple[int, int] | None:
        """A token of this piece from number ``first`` on, and the same of the next one, at which one may go over.

        Of those that will do, one near the middle of the overlap is taken, and at the beginning of a word if there is.
        """
        offset = max(first, self._first_from(following.begin))
        left = [self._token(number) for number in range(offset, len(self.ids))]
        right = [following._token(number) for number in range(following._first_from(self.end))]
        # Of several tokens that spell the bytes of one character the first.
        in_left = {start: number for number, (_, start, _, _) in reversed([*enumerate(left)])}
        in_right = {start: number for number, (_, start, _, _) in reversed([*enumerate(right)])}
        middle, size, found = (following.begin + self.end) / 2, AGREEING_TOKENS, None
        for start in sorted(in_left.keys() & in_right.keys(), key=lambda start: abs(start - middle)):
            i, j = in_left[start], in_right[start]
            if unicodedata.combining(self._text[start]):
                continue  # it may change places with others of its run, however long
            if size <= i <= len(left) - size and size <= j and left[i - size : i + size] == right[j - size : j + size]:
                if left[i][3]:
                    return offset + i, j
                if inside_words and found is None:
                    found = offset + i, j
        return found

    def _first_from(self, place: int) -> int:
        """The first token that begins at ``place`` of the text or after it."""
        return bisect_left(range(len(self.ids)), place, key=self._start)

    def _start(self, number: int) -> int:
        return self.begin + self.encoding.token_to_chars(number)[0]

    def _begins_word(self, number: int) -> bool:
        return number == 0 or self.encoding.token_to_word(number) != self.encoding.token_to_word(number - 1)

    def _token(self, number: int) -> tuple[int, int, int, bool]:
        start, end = self.encoding.token_to_chars(number)
        return self.ids[number], self.begin + start, self.begin + end, self._begins_word(number)


def _added(tokenizer: Tokenizer, vocabulary: Iterable[str]) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer puts before a text and after it."""
    for text in ("a", *vocabulary):
        encoding = tokenizer.encode(text)
        if 0 in (is_added := encoding.special_tokens_mask):
            first, last = is_added.index(0), len(is_added) - is_added[::-1].index(0)
            return encoding.ids[:first], encoding.ids[last:]
    return [], []


def _bytes_after_first(text: str, encoding: Any) -> int:
    if not encoding.ids:
        return -1
    _, end = encoding.token_to_chars(0) or (0, 0)  # None for an added BOS
    return len(text[end:].encode())
