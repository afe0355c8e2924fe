"""`jaxserve bench`: measures an engine in this process, or any OpenAI-compatible server."""
