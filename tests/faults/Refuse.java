// What a test has a broker refuse: `java -cp <jars>/* Refuse.java SERVERS COMMAND ...`, with one of
// config TOPIC NAME=VALUE (an empty value: the broker's default again), quota CLIENT_ID BYTES_A_SECOND (0: none),
// deny TOPIC, allow TOPIC (writing to it).
import java.util.List;
import java.util.Map;
import java.util.Set;
import org.apache.kafka.clients.admin.Admin;
import org.apache.kafka.clients.admin.AlterConfigOp;
import org.apache.kafka.clients.admin.ConfigEntry;
import org.apache.kafka.common.acl.AccessControlEntry;
import org.apache.kafka.common.acl.AclBinding;
import org.apache.kafka.common.acl.AclOperation;
import org.apache.kafka.common.acl.AclPermissionType;
import org.apache.kafka.common.config.ConfigResource;
import org.apache.kafka.common.quota.ClientQuotaAlteration;
import org.apache.kafka.common.quota.ClientQuotaEntity;
import org.apache.kafka.common.resource.PatternType;
import org.apache.kafka.common.resource.ResourcePattern;
import org.apache.kafka.common.resource.ResourceType;

public class Refuse {
    public static void main(String[] args) throws Exception {
        try (Admin admin = Admin.create(Map.of("bootstrap.servers", args[0]))) {
            switch (args[1]) {
                case "config" -> config(admin, args[2], args[3].split("=", 2));
                case "quota" -> quota(admin, args[2], Double.parseDouble(args[3]));
                case "deny" -> admin.createAcls(bindings(args[2])).all().get();
                case "allow" -> admin.deleteAcls(bindings(args[2]).stream().map(AclBinding::toFilter).toList()).all().get();
                default -> throw new IllegalArgumentException(args[1]);
            }
        }
    }

    private static void config(Admin admin, String topic, String[] setting) throws Exception {
        var type = setting[1].isEmpty() ? AlterConfigOp.OpType.DELETE : AlterConfigOp.OpType.SET;
        var change = new AlterConfigOp(new ConfigEntry(setting[0], setting[1]), type);
        var resource = new ConfigResource(ConfigResource.Type.TOPIC, topic);
        admin.incrementalAlterConfigs(Map.of(resource, List.of(change))).all().get();
    }

    private static void quota(Admin admin, String client, double bytes) throws Exception {
        var entity = new ClientQuotaEntity(Map.of(ClientQuotaEntity.CLIENT_ID, client));
        var change = new ClientQuotaAlteration.Op("producer_byte_rate", bytes == 0 ? null : bytes);
        admin.alterClientQuotas(Set.of(new ClientQuotaAlteration(entity, Set.of(change)))).all().get();
    }

    private static List<AclBinding> bindings(String topic) {
        var pattern = new ResourcePattern(ResourceType.TOPIC, topic, PatternType.LITERAL);
        return List.of(
            new AclBinding(pattern, new AccessControlEntry("User:*", "*", AclOperation.ALL, AclPermissionType.ALLOW)),
            new AclBinding(pattern, new AccessControlEntry("User:*", "*", AclOperation.WRITE, AclPermissionType.DENY)));
    }
}
