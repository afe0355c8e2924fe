from jaxserve.outputs import CompletionOutput, Logprob
from jaxserve.server.openai.logprobs import TextOffsets, completion_logprobs


def test_the_chosen_token_keeps_its_logprob_beside_one_that_reads_the_same():
    alternatives = {7: Logprob(-2.0, 2, "\ufffd"), 8: Logprob(-0.2, 1, "\ufffd"), 9: Logprob(-3.0, 3, "x")}
    output = CompletionOutput(0, "", [7], logprobs=[alternatives])
    shown = completion_logprobs(output, 3, TextOffsets(None))
    assert shown.token_logprobs == [-2.0]
    assert shown.top_logprobs == [{"\ufffd": -2.0, "x": -3.0}]
