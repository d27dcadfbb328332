"""Header names that router and replicas exchange, lower case as they stand on the wire.

A replica that knows them may send PROMPT_TOKENS, CACHED_TOKENS and LOAD with the head of its
answer: the router then learns what the cache held when the first token leaves, not when the
stream ends, and what else is going on there, without asking. The router adds REPLICA and
MATCHED_TOKENS, and CACHED_TOKENS where it can.
"""

REQUEST_ID = "x-request-id"
#: What a client's request id must match as a whole to be taken over: visible ASCII, bounded.
REQUEST_ID_PATTERN = r"[\x21-\x7e]{1,128}"

#: Which replica answers: the id that `roost route` gave it, e.g. "r0".
REPLICA = "x-roost-replica"
#: Tokens of the prompt that the router believed the replica to hold when it decided.
MATCHED_TOKENS = "x-roost-matched-tokens"
#: Tokens of the prompt that the replica in fact took from its KV cache.
CACHED_TOKENS = "x-roost-cached-tokens"
#: Tokens of the prompt, as the replica counted them.
PROMPT_TOKENS = "x-roost-prompt-tokens"
#: What the replica has to do: told_load.py. It ends at the router.
LOAD = "x-roost-load"
#: How many replicas were tried for this request; 1 is the usual case.
ATTEMPTS = "x-roost-attempts"

#: How long a request may wait before it is computed, in seconds ("2.5"); then it is refused.
REQUEST_TIMEOUT = "x-request-timeout-s"
