"""What a beam search found, in vLLM's form."""

from jaxserve.outputs import BeamSearchOutput, BeamSearchSequence, CompletionOutput, RequestOutput
from jaxserve.sampling_params import BeamSearchParams
from jaxserve.text.tokenizer import Tokenizer


def beam_search_output(
    found: RequestOutput, params: BeamSearchParams, tokenizer: Tokenizer | None
) -> BeamSearchOutput:
    def sequence(output: CompletionOutput) -> BeamSearchSequence:
        tokens = [*found.prompt_token_ids, *output.token_ids]
        text = tokenizer.decode(tokens) if tokenizer is not None else None
        total = output.cumulative_logprob or 0.0
        score = total / len(output.token_ids) ** params.length_penalty
        return BeamSearchSequence(tokens, text, total, score, output)

    return BeamSearchOutput([sequence(output) for output in found.outputs])
