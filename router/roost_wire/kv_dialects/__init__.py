"""KV events as engines send them, translated to roost_wire.kv_events: bytes in, events out."""
