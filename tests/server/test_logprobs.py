import math
from types import SimpleNamespace

from jaxserve.outputs import Logprob
from jaxserve.server.openai.logprobs import LOWEST, completion_logprobs, prompt_logprobs


def test_the_chosen_token_keeps_its_logprob_beside_one_that_reads_the_same():
    alternatives = {7: Logprob(-2.0, 2, "\ufffd"), 8: Logprob(-0.2, 1, "\ufffd"), 9: Logprob(-3.0, 3, "x")}
    tokenizer = SimpleNamespace(token_text=lambda token: "\ufffd")
    shown = completion_logprobs([7], [alternatives], 3, [0], tokenizer)
    assert shown.token_logprobs == [-2.0]
    assert shown.top_logprobs == [{"\ufffd": -2.0, "x": -3.0}]


def test_a_prompts_entries_are_its_own_token_and_as_many_as_asked_for_in_numbers_that_json_has():
    entry = {7: Logprob(-math.inf, 9, "g"), 8: Logprob(-0.2, 1, "h"), 9: Logprob(-3.0, 2, "i")}
    shown = prompt_logprobs([5, 7], [None, entry], 1)
    assert shown == [None, {7: Logprob(LOWEST, 9, "g"), 8: Logprob(-0.2, 1, "h")}]
    assert entry[7].logprob == -math.inf
