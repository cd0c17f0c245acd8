"""DeepSparse 1.8.0 in the old Python it needs: runs a network once for every line it is sent, and answers with its seconds.

    DEEPSPARSE_PYTHON model.onnx inputs.npz threads

cpu_sparse.py starts it, so that both sides are timed in turns. First line out: "ready" or why not.
"""

import os
import sys
import time

os.environ["NM_DISABLE_ANALYTICS"] = "1"


def main():
    import deepsparse
    import numpy as np

    model, inputs, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    stored = np.load(inputs)
    values = [np.ascontiguousarray(stored[name]) for name in stored.files]
    engine = deepsparse.Engine(model=model, batch_size=1, num_cores=threads)
    engine.run(values)
    print("ready", flush=True)
    for _ in sys.stdin:
        cpu, wall = time.process_time(), time.perf_counter()
        engine.run(values)
        print(time.process_time() - cpu, time.perf_counter() - wall, flush=True)


if __name__ == "__main__":
    try:
        main()
    except Exception as error:  # the other side prints it
        print(f"{type(error).__name__}: {error}".splitlines()[0][:200], flush=True)
