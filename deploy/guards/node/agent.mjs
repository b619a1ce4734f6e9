// An agent that obeys: it works until it is halted, and says why. Exit code 3: halted.
import { Guard, Halted } from "./guard.mjs";

const guard = await Guard.start();
console.log(JSON.stringify({ guard: guard.id, state: guard.state }));
let code = 0;
const controller = new AbortController();
guard.onHalt(() => controller.abort()); // give controller.signal to fetch: a call in flight is cut
try {
  for (;;) {
    guard.check();
    // ... your model call, with guard.model("gpt-5") and controller.signal
    await new Promise((done) => setTimeout(done, 20));
  }
} catch (error) {
  if (!(error instanceof Halted)) throw error;
  console.log(JSON.stringify({ halted: error.message, seq: error.command?.seq ?? null, cut: controller.signal.aborted }));
  code = 3;
} finally {
  await guard.close();
}
process.exit(code);
