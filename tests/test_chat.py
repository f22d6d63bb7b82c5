"""What the terminal shows of an answer while it is generated is the answer, without what ends it."""

from __future__ import annotations

import io

import pytest
import torch

from tests.data_fixtures import make_spec
from tests.data_fixtures import tokenizer_dir as tokenizer_dir
from vlit.config.schema import DataConfig
from vlit.data.tokenize import SampleTokenizer
from vlit.serve.chat import _Streamer


@pytest.mark.parametrize("template", ["v0", "v1", "chatml"])
@pytest.mark.parametrize("answer", ["A cat.", "One\n\nTwo ## three\n##", "Not \n### yet", ""])
def test_the_stream_shows_the_answer_without_what_ends_it(template: str, answer: str, tokenizer_dir) -> None:
    tokenizer = SampleTokenizer(make_spec(tokenizer_dir("chatml")), DataConfig(template=template))
    ids, stop = tokenizer.encoder.encode(answer, "text"), tokenizer.stop_sequences()[0]
    for ended in (True, False):  # by the template's end, or by max_new_tokens
        stream = io.StringIO()
        streamer = _Streamer(tokenizer, stream)
        shown = []
        for token in [*ids, *stop] if ended else ids:
            streamer.put(torch.tensor([token]))
            shown.append(stream.getvalue())
        streamer.end()
        assert stream.getvalue() == answer + "\n"
        assert all(answer.startswith(text) for text in shown)
        assert len(answer) < 5 or len(set(shown)) > 2, "it comes in pieces"
