"""Every path but three is denied on the data port, in OpenAI's shape, whatever a replica serves."""

from __future__ import annotations

import asyncio
import json

import pytest
from recording_replica import RecordingReplica

#: What vLLM, SGLang, sglang-router, smg, llama.cpp and TGI answer beside the OpenAI API, and ours.
PATHS = [
    "/",
    "/health",
    "/ready",
    "/metrics",
    "/fleet",
    "/dashboard/main.js",
    "/load",
    "/ping",
    "/version",
    "/docs",
    "/redoc",
    "/openapi.json",
    "/server_info",
    "/invocations",
    "/pause",
    "/resume",
    "/is_paused",
    "/update_weights",
    "/collective_rpc",
    "/reset_prefix_cache",
    "/reset_mm_cache",
    "/reset_encoder_cache",
    "/sleep",
    "/wake_up",
    "/is_sleeping",
    "/scale_elastic_ep",
    "/is_scaling_elastic_ep",
    "/start_profile",
    "/stop_profile",
    "/init_weight_transfer_engine",
    "/get_world_size",
    "/tokenizer_info",
    "/abort_requests",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/load_lora_adapter",
    "/tokenize",
    "/detokenize",
    "/pooling",
    "/classify",
    "/score",
    "/v1/score",
    "/rerank",
    "/v1/rerank",
    "/v2/rerank",
    "/inference/v1/generate",
    "/generate",
    "/generate_stream",
    "/workers",
    "/workers/r0",
    "/add_worker",
    "/remove_worker",
    "/list_workers",
    "/flush_cache",
    "/get_loads",
    "/get_server_info",
    "/get_model_info",
    "/update_weights_from_disk",
    "/update_weights_from_tensor",
    "/release_memory_occupation",
    "/set_internal_state",
    "/configure_logging",
    "/open_session",
    "/freeze_gc",
    "/kill",
    "/shutdown",
    "/admin",
    "/_routes",
    "/wasm",
    "/slots",
    "/props",
    "/completion",
    "/infill",
    "/apply-template",
    "/lora-adapters",
    "/models/load",
    "/models/unload",
    "/v1/messages",
    "/v1/audio/transcriptions",
    "/v1/responses",
    "/v1/batches",
    "/v1/files",
    "/v1",
    "/v1/",
    "/v1/model",
    "/v1/chat",
    "/v1/chat/completions/x",
    "/v1/completions/render",
    "/.env",
    "/etc/passwd",
    "/../../etc/passwd",
    "/debug/pprof",
]


@pytest.mark.parametrize(
    "method", [b"GET", b"POST", b"DELETE", b"PUT", b"OPTIONS", b"HEAD", b"PATCH"]
)
async def test_paths_that_are_not_listed_are_not_found(start_router, method):
    replica = await RecordingReplica().start()
    router = await start_router(replica, poll_interval_s=60.0)
    reader, writer = await asyncio.open_connection(*router.address)

    async with asyncio.timeout(20):
        for path in PATHS:
            writer.write(
                b"%b %b HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n" % (method, path.encode())
            )
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            body = b"" if method == b"HEAD" else await reader.readexactly(length)

            assert head.startswith(b"HTTP/1.1 404"), (path, head)
            if body:
                assert json.loads(body)["error"]["code"] == "not_found"
    writer.close()

    assert replica.take() == b""
    await replica.stop()
