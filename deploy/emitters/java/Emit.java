// Emits the usage of model calls of one agent: java -cp 'kafka-clients.jar:slf4j-api.jar' Emit.java 20
import java.time.Instant;
import java.util.Properties;
import java.util.UUID;
import java.util.concurrent.Future;
import java.util.ArrayList;
import java.util.List;
import org.apache.kafka.clients.producer.KafkaProducer;
import org.apache.kafka.clients.producer.ProducerRecord;
import org.apache.kafka.clients.producer.RecordMetadata;
import org.apache.kafka.common.serialization.StringSerializer;

public class Emit {
    static String env(String name, String otherwise) {
        String value = System.getenv("SPENDFUSE_" + name);
        return value == null ? otherwise : value;
    }

    public static void main(String[] arguments) throws Exception {
        int calls = arguments.length > 0 ? Integer.parseInt(arguments[0]) : 1;
        String workspace = env("WORKSPACE", "default"), team = env("TEAM", "default"), agent = env("AGENT", "java");
        Properties settings = new Properties();
        settings.put("bootstrap.servers", env("BOOTSTRAP_SERVERS", "127.0.0.1:9092"));
        settings.put("acks", "all");
        List<Future<RecordMetadata>> sent = new ArrayList<>();
        try (var producer = new KafkaProducer<>(settings, new StringSerializer(), new StringSerializer())) {
            for (int call = 0; call < calls; call++) {
                String usage = String.format(
                    "{\"v\":1,\"id\":\"java:%s\",\"ts\":\"%s\",\"workspace\":\"%s\",\"team\":\"%s\",\"agent\":\"%s\","
                        + "\"run\":\"%s\",\"provider\":\"anthropic\",\"model\":\"%s\","
                        + "\"tokens\":{\"input\":200,\"output\":100},\"source\":\"spendfuse-java-example\"}",
                    UUID.randomUUID(), Instant.now(), workspace, team, agent, env("RUN", "run-java"),
                    System.getenv().getOrDefault("MODEL", "claude-sonnet-4-6"));
                // Any partitioner will do, spendfuse routes by agent itself.
                sent.add(producer.send(new ProducerRecord<>("spendfuse.usage.v1", workspace + "/" + team + "/" + agent, usage)));
            }
            for (Future<RecordMetadata> each : sent) {
                each.get(); // fails when the broker did not take it
            }
        }
        System.out.println("emitted " + sent.size());
    }
}
