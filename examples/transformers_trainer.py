"""Token superposition under the stock transformers Trainer: attach the model, and give it scheduled tokens.

superpose prepare 'src/**/*.py' --bytes --out data
python examples/transformers_trainer.py data --out model
"""

import argparse

from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

import superpose as sp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="directory made by superpose prepare")
    parser.add_argument("--out", default="runs/example")
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    store = sp.TokenStore(arguments.data)
    config = LlamaConfig(
        vocab_size=store.vocab_size,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = AutoModelForCausalLM.from_config(config)

    sp.attach(model)
    schedule = sp.Schedule.tst(steps=arguments.steps, bag_size=4, ratio=0.3)
    data = sp.ScheduledTokens(store, schedule, positions=64, sequences_per_step=16)

    training = TrainingArguments(
        output_dir=arguments.out,
        num_train_epochs=1,  # the dataset is exactly schedule.steps steps long
        per_device_train_batch_size=16,  # × accumulation × processes = sequences_per_step
        train_sampling_strategy="sequential",  # the step is in the sample's index
        learning_rate=2e-3,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": arguments.steps // 10},
        warmup_steps=arguments.steps // 20,
        adam_beta2=0.95,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
    )
    trainer = Trainer(model, training, train_dataset=data)
    trainer.train()
    sp.detach(model).save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
