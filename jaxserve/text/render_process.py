"""The process in which a client's own chat template is rendered: it may loop for ever or grow without end.

Reads `[source, variables, messages, options]` as JSON and writes `{"text"}` or `{"error", "param"}`.
"""

import json
import resource
import sys

from jaxserve.errors import InvalidRequest
from jaxserve.text.chat_template import ChatTemplate

CPU_SECONDS = 2
MEMORY = 512 * 2**20
LONGEST = 2**23
"""Characters of the prompt."""


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    source, variables, messages, options = json.load(sys.stdin)
    try:
        text = ChatTemplate(source, variables, given=True).render(messages, **options)
        if len(text) > LONGEST:
            raise InvalidRequest(f"the chat_template gives more than {LONGEST} characters", "chat_template")
        answer = {"text": text}
    except InvalidRequest as error:
        answer = {"error": str(error), "param": error.param, "code": error.code}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
