"""A calculator, for a model of characters that cannot add: it may ask, or guess."""

TEMPLATE = (
    "{% for message in messages %}{{ message.content }}{{ '.' if message.role == 'assistant' else '>' }}{% endfor %}"
)


class Calculator:
    """ "=" asks for the sum, which comes as the answer of a tool; anything else is the model's own answer."""

    def reset(self, row):
        self.sum = str(sum(map(int, row["prompt"][0]["content"].split("+"))))
        self.has_asked = False

    def step(self, messages):
        said = messages[-1]["content"]
        if said == "=" and not self.has_asked:
            self.has_asked = True
            return [{"role": "tool", "content": self.sum}], 0.0, False
        return [], float(said == self.sum), True


class Endless:
    """Always has another question."""

    def reset(self, row):
        self.steps = 0

    def step(self, messages):
        self.steps += 1
        assert len(messages) == 2 * self.steps and messages[-1]["role"] == "assistant"
        return [{"role": "user", "content": "1+1"}], 0.5, False


class Wrong:
    """What `reset` and `step` do is set by the test."""

    begins, answers = staticmethod(lambda row: None), staticmethod(lambda messages: ([], 0.0, True))

    def reset(self, row):
        self.begins(row)

    def step(self, messages):
        return self.answers(messages)
