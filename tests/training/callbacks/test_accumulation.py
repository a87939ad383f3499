"""WholeBatchAccumulation."""

from fastai.callback.core import Callback

from helpers.runs import trained


class Watch(Callback):
    """The weights after every step, and those that are validated."""

    order = 90

    def before_fit(self):
        self.steps, self.validated = [], []

    def after_step(self):
        self.steps.append({name: tensor.clone() for name, tensor in self.model.state_dict().items()})

    def before_validate(self):
        self.validated.append({name: tensor.clone() for name, tensor in self.model.state_dict().items()})


def test_gradients_are_accumulated_over_batches():
    learn = trained("train.accumulate=2", "train.epochs=2", callbacks=[watch := Watch()])
    assert len(learn.recorder.losses) == 8 and len(watch.steps) == 3  # 1,437 images of 800 a step, twice
    assert learn.whole_batch_accumulation.n_acc == 800
