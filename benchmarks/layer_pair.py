"""Two providers of one layer taking turns in this process; prints their times as JSON."""

import argparse
import json

import measure
import torch
from providers import Layer, Providers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs=2, help="of the providers")
    parser.add_argument("layer", help="the fields of Layer as JSON, dtype by name")
    parser.add_argument("repeats", type=int)
    parser.add_argument("training", choices=["True", "False"], help="forward+backward or forward")
    options = parser.parse_args()
    fields = json.loads(options.layer)
    layer = Layer(**{**fields, "dtype": getattr(torch, fields["dtype"])})
    training = options.training == "True"
    providers = Providers(layer, training=training)
    every = providers.forward()
    functions = {name: every[name] for name in options.names}
    if training:
        functions = {name: providers.step(run) for name, run in functions.items()}
    with torch.set_grad_enabled(training):
        times = measure.interleaved_ms(functions, layer.device, repeats=options.repeats)
    print(json.dumps(times))


if __name__ == "__main__":
    main()
