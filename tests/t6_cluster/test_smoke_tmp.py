import pytest
from cluster_nodes import *
pytestmark = needs_root
@pytest.mark.parametrize("passthrough", PASSTHROUGH)
def test_smoke(cluster, passthrough):
    p, r = cluster.pair()
    c = p.connect("a.db")
    c.execute("create table t(a)")
    for mode in ["wal", "delete", "wal"]:
        c.execute(f"pragma journal_mode={mode}")
        for i in range(20):
            c.execute("insert into t values(1)")
        wait_same_position(p, r, "a.db")
        k = r.connect("a.db")
        assert dump(k) == dump(c)
        k.close()
        assert_same_bytes([p, r], "a.db")
    c.close()
    r.stop(); p.stop()
