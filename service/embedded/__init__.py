"""An OpenAI-compatible engine for one small LLaVA on one machine: micro-batches, nothing clever.

It speaks vLLM's protocol, so that whatever talks to it can talk to vLLM instead. Where vLLM is lax, it is
strict: adapters are checked before they are loaded, no name is ever reused in place, no URL is fetched.
"""
