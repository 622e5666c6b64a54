"""How large a cluster could grow to, from the very configurations that its autoscaler reads."""

from __future__ import annotations

import http.server
import json
import os
import ssl
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr as kuberay_config,
)
from ray.autoscaler._private.util import prepare_config

from flowray.cluster.capacity import read_config, workers_at_most
from flowray.config.recipe import Recipe
from flowray.sweepconfig.sweep import Sweep
from flowray.tune.plan import Cluster, share_cluster

CLUSTER = Path(__file__).parents[2] / "cluster"
AUTO = {"num_workers": "auto", "cpus_per_worker": "auto", "gpus_per_worker": "auto"}


def config(name: str) -> dict:
    """The configuration as the autoscaler has it, of a file under cluster/."""
    plain = yaml.safe_load((CLUSTER / name).read_text())
    if not name.startswith("kuberay"):
        return prepare_config(plain)
    plain["metadata"]["namespace"] = "default"
    return kuberay_config(plain)


def sweep(**changes) -> Sweep:
    parameters = {"optim.lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2}}
    plain = {
        "name": "s",
        "base": "unused",
        "metric": {"name": "loss/total"},
        "parameters": parameters,
        "method": "random",
        "run_cap": 100,
    }
    return Sweep.model_validate(plain | changes)


@pytest.mark.parametrize(
    ("name", "workers"),
    [
        ("aws.yaml", [(8, 1)] * 8),  # of two types with eight each, the cluster may have eight
        ("gcp.yaml", [(8, 1)] * 8),
        ("kuberay/raycluster.yaml", [(8, 1)] * 8),
        ("onprem.yaml", []),  # states no size
    ],
)
def test_the_files_under_cluster_say_how_far_they_grow(name, workers):
    assert workers_at_most(config(name)) == workers


def test_the_nodes_with_most_gpus_count_first_within_the_maximum():
    types = {
        "head": {"resources": {"CPU": 16}},
        "cpu": {"resources": {"CPU": 64}, "max_workers": 10},
        "small": {"resources": {"CPU": 8, "GPU": 1}},
        "large": {"resources": {"CPU": 32, "GPU": 8}, "max_workers": 2},
    }
    plain = {"max_workers": 5, "head_node_type": "head", "available_node_types": types}
    assert workers_at_most(plain) == [(32, 8)] * 2 + [(8, 1)] * 3
    assert workers_at_most({**plain, "max_workers": 0}) == []
    assert workers_at_most({}) == []


def test_auto_on_a_head_without_cpus_follows_the_nodes_that_may_come():
    head = (0, 0)
    aws = Cluster((head, *workers_at_most(config("aws.yaml"))))
    takes, at_once = share_cluster(sweep(resources=AUTO), Recipe(), aws)
    assert list(takes.values()) == [1, 8, 1]
    assert at_once == 8
    # no more than there are trials
    assert share_cluster(sweep(resources=AUTO, run_cap=3), Recipe(), aws)[1] == 3
    wide, at_once = share_cluster(sweep(resources=AUTO, max_concurrent=2), Recipe(), aws)
    assert (list(wide.values()), at_once) == ([4, 8, 1], 2)


def test_a_share_of_the_cpus_fits_on_one_node():
    nodes = Cluster(((0, 0), (4, 0), (4, 0), (4, 0)))
    takes, at_once = share_cluster(sweep(resources=AUTO), Recipe(), nodes)
    assert (takes["resources.cpus_per_worker"], at_once) == (4, 3)
    takes, at_once = share_cluster(sweep(resources={"cpus_per_worker": 3}), Recipe(), nodes)
    assert at_once == 3  # not 12 // 3: on each node one CPU is left over


def test_drivers_of_trials_with_several_workers_fit_in_the_heads_memory():
    aws = Cluster(((0, 0), *[(8, 1)] * 8), drivers=3)
    pairs = {"num_workers": 2, "gpus_per_worker": 1}
    assert share_cluster(sweep(resources=pairs), Recipe(), aws)[1] == 3
    assert share_cluster(sweep(resources=pairs, max_concurrent=4), Recipe(), aws)[1] == 3
    # such a trial is its own driver
    assert share_cluster(sweep(resources={"gpus_per_worker": 1}), Recipe(), aws)[1] == 8


def test_the_configuration_is_read_where_the_autoscaler_of_this_cluster_reads_it(tmp_path):
    """Two processes with an autoscaler's arguments, of two clusters; none of a third, outside
    Kubernetes.
    """
    sleeper = [sys.executable, "-c", "import time; print('here', flush=True); time.sleep(60)"]
    started = []
    try:
        for port, most in ((6379, 3), (6380, 5)):
            (tmp_path / f"{port}.yaml").write_text(yaml.safe_dump({"max_workers": most}))
            words = [f"--gcs-address=10.0.0.1:{port}", f"--autoscaling-config={port}.yaml"]
            started.append(
                subprocess.Popen([*sleeper, *words], cwd=tmp_path, stdout=subprocess.PIPE)
            )
        for process in started:  # its words show a moment after it was started
            assert process.stdout.readline() == b"here\n"
        assert read_config("10.0.0.1:6380") == {"max_workers": 5}
        assert read_config("10.0.0.1:6379") == {"max_workers": 3}
        assert read_config("10.0.0.1:6381") is None
    finally:
        for process in started:
            process.kill()
            process.communicate()


def test_kuberays_cluster_is_read_from_the_kubernetes_api(tmp_path):
    """A server of that API on loopback, asked by a process in a pod's environment."""
    certificate = tmp_path / "server.pem"
    make = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "1",
        "-subj",
        "/CN=localhost",
    ]
    make += [
        "-addext",
        "subjectAltName=DNS:localhost",
        "-keyout",
        str(tmp_path / "key.pem"),
        "-out",
        str(certificate),
    ]
    if subprocess.run(make, capture_output=True).returncode:
        pytest.skip("no openssl to make a certificate with")
    cluster = yaml.safe_load((CLUSTER / "kuberay" / "raycluster.yaml").read_text())
    cluster["metadata"]["namespace"] = "research"

    class Api(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.path == "/apis/ray.io/v1/namespaces/research/rayclusters/flowray"
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(json.dumps(cluster).encode() if known else b"")

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Api)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, tmp_path / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    pod = {
        "KUBERNETES_SERVICE_HOST": "localhost",
        "KUBERNETES_SERVICE_PORT_HTTPS": str(server.server_address[1]),
        "RAY_KUBERAY_CA_CERT_PATH": str(certificate),
        "RAY_KUBERAY_CLIENT_CERT_PATH": str(certificate),
        "RAY_KUBERAY_CLIENT_KEY_PATH": str(tmp_path / "key.pem"),
        "RAY_CLUSTER_NAMESPACE": "research",
        "NO_PROXY": "localhost",
    }
    (tmp_path / "namespace").write_text("research")  # as Kubernetes puts it into pods
    ask = f"""if True:
        import os
        from pathlib import Path
        from flowray.cluster import capacity
        def told():
            return capacity.workers_at_most(capacity.read_config("10.0.0.1:6379") or {{}})
        for os.environ["RAY_CLUSTER_NAME"] in ("another", "flowray"):
            print(told())
        del os.environ["RAY_CLUSTER_NAMESPACE"]
        folder = Path({str(tmp_path)!r})
        for capacity.POD_NAMESPACE in (folder / "namespace", folder / "none"):
            print(told())
    """
    try:
        asked = subprocess.run(
            [sys.executable, "-c", ask],
            env={**os.environ, **pod},
            capture_output=True,
            text=True,
            timeout=240,
        )
        grown = str([(8, 1)] * 8)
        assert asked.stdout.splitlines() == ["[]", grown, grown, "[]"], asked.stderr[-2000:]
    finally:
        server.shutdown()
        server.server_close()
