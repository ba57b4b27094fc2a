"""Source of the apps that `benchmarks.exchange` runs: plain Flower's, and ours with noise."""

PLAIN_APP = """
import time

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from transformers import Wav2Vec2Config, Wav2Vec2ForPreTraining

client = ClientApp()
server = ServerApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    model = Wav2Vec2ForPreTraining(Wav2Vec2Config())
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn(value.shape, generator=generator), alpha=1e-4)
    content = {
        "arrays": ArrayRecord(model.state_dict()),
        "metrics": MetricRecord({"num-examples": 1}),
    }
    return Message(RecordDict(content), reply_to=message)


class Timed(FedAvg):
    def aggregate_train(self, server_round, replies):
        found = super().aggregate_train(server_round, replies)
        with open(self.times, "a") as stream:
            stream.write(f"{time.time()}\\n")
        return found


@server.main()
def main(grid: Grid, context: Context) -> None:
    arrays = ArrayRecord(Wav2Vec2ForPreTraining(Wav2Vec2Config()).state_dict())
    clients = int(context.run_config["clients"])
    strategy = Timed(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=clients,
                     min_available_nodes=clients)
    strategy.times = context.run_config["times"]
    with open(strategy.times, "w") as stream:
        stream.write(f"{time.time()}\\n")
    strategy.start(grid, arrays, num_rounds=int(context.run_config["rounds"]))
"""
PLAIN_PROJECT = """
[project]
name = "plain"
version = "1.0.0"
[tool.flwr.app]
publisher = "benchmark"
[tool.flwr.app.components]
serverapp = "plain:server"
clientapp = "plain:client"
[tool.flwr.app.config]
times = ""
clients = 4
rounds = 2
"""
NOISE_CLIENT = '''
"""The project's ClientApp, which adds noise instead of training."""

import collections

import torch

from fl_client import client_app, local_training
from ssl_core.training.pretraining_step import StepReport


def _noise(model, *_):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn(value.shape, generator=generator), alpha=1e-4)
    fields = dict.fromkeys(StepReport.__dataclass_fields__, 1.0)
    report = StepReport(**(fields | {"applied": True, "crops": 1}))
    return local_training._Trained([report], {0}, collections.Counter())


local_training._train = _noise
app = client_app.app
'''
