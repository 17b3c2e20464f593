import time
def test_warm(lab, tmp_path):
    t=time.time(); e=lab.mirl("--version"); print(e, time.time()-t)
    t=time.time(); e=lab.play(tmp_path); print(e.said(), time.time()-t)
def test_ref(lab, reference):
    print(lab.digests(reference))
