"""URLs that no replica can have are refused however they are written."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roost_router.config import ConfigError, RouterConfig
from roost_router.replica_url import ReplicaUrlError, check_replica_url

GOOD = [
    "http://127.0.0.1:8101", "http://127.0.0.1", "http://localhost:8101/", "https://gpu-7.internal",
    "http://10.0.0.7:8000", "http://192.168.1.2:80/base", "http://172.16.0.1:1", "http://[::1]:8101",
    "http://[fd00::7]:8101", "http://8.8.8.8", "http://replica_1:8000", "http://pod.ns.svc.cluster.local:80",
    "http://100.64.0.1:8000", "http://1password:80", "http://a1.b2c", "http://EXAMPLE.com.:80",
]  # fmt: skip

BAD = [
    # Link-local and metadata services, written plainly
    "http://169.254.169.254", "http://169.254.169.254:80/", "http://169.254.0.1:8101",
    "http://169.254.170.2", "http://[fe80::1]:8101", "http://[febf::1]", "http://[fe80::1%25eth0]",
    "http://[fd00::1%25eth0]", "http://[fd00:ec2::254]", "http://100.100.100.200",
    "http://168.63.129.16", "http://192.0.0.192", "http://metadata.google.internal",
    "http://Metadata.Google.Internal.", "http://metadata", "http://metadata.goog/",
    "http://instance-data",
    # The same in other notations
    "http://2852039166", "http://0xa9fea9fe", "http://0xA9.0xFE.0xA9.0xFE", "http://0251.0376.0251.0376",
    "http://169.254.43518", "http://169.16689662", "http://169.254.169.254.", "http://0x",
    "http://[::ffff:169.254.169.254]", "http://[::ffff:a9fe:a9fe]", "http://[::169.254.169.254]",
    "http://[64:ff9b::a9fe:a9fe]", "http://[2002:a9fe:a9fe::1]", "http://169.254.169.254%00",
    "http://①⑥⑨.②⑤④.①⑥⑨.②⑤④", "http://169。254。169。254", "http://169.254.169.0xfe",
    # No address at all, or everybody's
    "http://0.0.0.0:8101", "http://0", "http://0.1.2.3", "http://[::]:8101", "http://[::ffff:0.0.0.0]",
    "http://255.255.255.255", "http://224.0.0.1", "http://240.0.0.1", "http://[ff02::1]", "http://127.1",
    "http://127.0.0.1.5", "http://017700000001", "http://256.1.1.1", "http://01.2.3.4",
    # URLs that are read differently by different readers
    "http://a@169.254.169.254", "http://a:b@127.0.0.1", "http://127.0.0.1\t:80",
    "http://127.0.0.1\n", " http://127.0.0.1", "http://127.0.0.1#@169.254.169.254",
    "http://127.0.0.1?a=b", "http://127.0.0.1\\@169.254.169.254", "http:127.0.0.1",
    "http:///127.0.0.1", "//127.0.0.1", "127.0.0.1:80",
    "http://", "ftp://127.0.0.1", "file:///etc/passwd", "gopher://127.0.0.1", "http://127.0.0.1:0",
    "http://127.0.0.1:65536", "http://127.0.0.1:x", "http://[127.0.0.1", "http://a b", "http://%31",
    "http://-a", "http://a..b", "http://.", "http://ä.example", "http://127.0.0.1/v1", "http://127.0.0.1/v1/",
    "http://[v1.fe80::]", "",
]  # fmt: skip


@pytest.mark.parametrize("url", GOOD)
def test_replicas_live_at(url):
    check_replica_url(url)


@pytest.mark.parametrize("url", BAD)
def test_no_replica_lives_at(url):
    with pytest.raises(ReplicaUrlError):
        check_replica_url(url)
    with pytest.raises(ConfigError):
        RouterConfig(replicas=(url,))


@given(st.text() | st.from_regex(r"http://[0-9a-fx.:\[\]%@]{1,30}", fullmatch=True))
def test_no_text_breaks_the_check(url):
    with suppress(ReplicaUrlError):
        check_replica_url(url)
